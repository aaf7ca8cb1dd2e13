"""Help pages: every option has a sentence, a default in words, a group, and one spelling that is shown."""

import argparse
import re

import pytest

from ds_wsi.cli import build_parser, main
from ds_wsi.training.options import any_case
from ds_wsi.training.setting_list import GROUPS, OPTIONS, default_words


@pytest.fixture(scope="module")
def commands():
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_training_has_words_of_its_own(name):
    field_path, declared, default, group = OPTIONS[name]
    text = declared.help
    assert len(text.split()) >= 3, "a sentence that can be read without the option"
    assert not re.match(r"(of|which|its|their|others) ", text)
    words = default_words(field_path)
    assert words
    assert words not in ("None", "()", "True", "False")
    assert group in GROUPS
    if default is None:
        assert len(words) > 1


def test_the_page_of_train_has_groups_examples_and_one_spelling(commands):
    text = commands["train"].format_help()
    assert [line[:-1] for line in text.splitlines() if line[:-1] in GROUPS] == list(GROUPS)
    assert "--num_train_epochs N" in text
    assert "--num-train-epochs" not in text
    assert text.count("\n  ds-wsi train") == 3, "examples"
    assert "usage: ds-wsi train [--option value ...]\n" in text
    options = {line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")}
    assert len(options) == len(OPTIONS) + 3, "and --config, --write_config and --dry_run"
    for part in re.split(r"\n  (?=--)", text.split("\n\nexamples:")[0])[1:]:
        assert "(default: " in " ".join(part.split()), part


def test_every_option_of_every_command_has_help(commands):
    for name, parser in commands.items():
        for action in parser._actions:
            assert action.help, (name, action.option_strings)
        parser.format_help()


def test_choices_are_taken_in_any_case(capsys):
    parse = build_parser("train").parse_args
    options = parse(["train", "--aggregator", "ABMIL", "--metric-for-best-model", "AUC"])
    assert vars(options)["model.aggregator"] == "abmil"
    assert vars(options)["run.metric_for_best_model"] == "auc"
    assert any_case(("a", "A"))("A") == "A", "as it is, where it is one"
    with pytest.raises(SystemExit):
        main(["train", "--aggregator", "nothing"])
    assert len(capsys.readouterr().err.splitlines()) == 1
