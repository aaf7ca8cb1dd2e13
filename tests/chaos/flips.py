"""A bit that is turned in a file which the program wrote."""

import re
import shutil
from pathlib import Path

from ds_wsi.training.checkpoint import list_checkpoints

from .after import EACH_STEP, RESUMES, compare, go_on, judge_refusal, must_end
from .case import LOST, SILENT, Case, Moment, NotRunError, Outcome, Shot
from .launch import start, wait
from .yard import DROPOUT, Yard, differences

PLACES_OF_BYTE = {"first": 0.0, "middle": 0.5, "last": 1.0}


def flip(path: Path, place: str) -> None:
    """Turn one bit of one byte round."""
    data = bytearray(path.read_bytes())
    at = round((len(data) - 1) * PLACES_OF_BYTE[place])
    data[at] ^= 0x01
    path.write_bytes(data)


def flipped_checkpoint(case: Case, yard: Yard) -> Outcome:
    """A bit of a file of the newest checkpoint is turned: it is named, and the checkpoint before it is taken."""
    number, byte = str(case.at).split()[1:3]
    more = (*DROPOUT, "--ema_decay", "0.9", *EACH_STEP)
    words = yard.words(yard.run, case.engine, *more)
    whole = yard.whole(words, yard.run, case.engine, case.ranks, "average")
    torn = yard.root / f"killed-{case.engine}-{case.ranks}"
    if not torn.exists():
        shots = (Shot("kill", Moment("step", 9 // case.ranks), 0),)
        wait(start(words, case.engine, case.ranks, yard.logs, shots=shots), yard.timeout_s)
        yard.run.rename(torn)
    outcome = Outcome()
    shutil.copytree(torn, yard.run)
    newest = list_checkpoints(yard.run)[0]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    if int(number) >= len(files):
        raise NotRunError(f"{newest.name} has {len(files)} files")
    damaged = files[int(number)]
    flip(damaged, byte)
    ended = go_on([*words, RESUMES], case, yard, outcome, None)
    outcome.codes = ended.codes
    named = r"is torn \(" if damaged.name == "files.json" else rf"is torn \({re.escape(damaged.name)} "
    outcome.require(re.search(named, ended.words), SILENT, f"{damaged.name} is not named: {ended.words[-600:]}")
    compare(outcome, yard.run, whole)
    outcome.detail = outcome.detail or damaged.name
    return outcome


def flipped_store(case: Case, yard: Yard) -> Outcome:
    """A bit of a slide's packed tiles is turned: the run says so or is not changed, and `tile --verify` mends it."""
    number, byte = str(case.at).split()[1:3]
    folder, outcome = yard.cohort("slides"), Outcome()
    tiles, store = yard.place / "tiles", yard.place / "store"
    of_slides = ["--manifest", str(folder / "slides.csv"), "--tile_size_px", "64"]
    pack = ["tile", *of_slides, "--output_dir", str(tiles), "--store", str(store), "--verify"]
    of_train = [*of_slides, "--tiles_dir", str(tiles), "--tile_store", str(store), "--encoder", "resnet10t"]
    of_train += ["--freeze_encoder", "--num_train_epochs", "1", "--dataloader_num_workers", "0", "--disable_tqdm"]
    must_end(pack, yard)
    words = ["train", *of_train, "--output_dir", str(yard.run)]
    whole = yard.whole(words, yard.run, "plain", 1, "store")
    files = sorted(path for path in store.iterdir() if path.is_file())
    if int(number) >= len(files):
        raise NotRunError(f"the store has {len(files)} files")
    damaged, sound = files[int(number)], files[int(number)].read_bytes()
    flip(damaged, byte)
    ended = wait(start(words, "plain", 1, yard.logs), yard.timeout_s)
    judge_refusal(outcome, ended, re.escape(damaged.name))
    told = damaged.name in ended.words or damaged.stem in ended.words
    changed = ended.codes == [0] and bool(differences(yard.run, whole))
    outcome.require(told or not changed, SILENT, f"{damaged.name}: other weights, and nothing is said")
    outcome.detail = f"{damaged.name}: {'other weights, told' if changed else f'ended with {ended.codes[0]}'}"
    must_end(pack, yard)
    mended = damaged.read_bytes() == sound
    shutil.rmtree(yard.run, ignore_errors=True)
    must_end(words, yard)
    outcome.require(not differences(yard.run, whole), LOST, f"not mended by tile --verify (same bytes: {mended})")
    return outcome
