"""A streamed bag: memory that does not grow with its tiles; bytes exchanged that do not either."""

from launch.benchmarks.scaling import COLORS, RANKS, Costs, Link, peak_bytes, simulate


def test_peak_memory_is_flat_from_1000_to_40000_tiles():
    few, many = peak_bytes(1_000), peak_bytes(40_000)
    # A float32 score a tile is kept, and comes back as its attention.
    assert many - 3 * 4 * 40_000 < 1.05 * few
    assert peak_bytes(1_000, chunk_size=1_000) > 5 * few


def test_the_simulated_exchange_grows_as_the_formula_says():
    costs, link = Costs(tile_s=1e-3, instance_s=1e-6, width=512, gradient_bytes=45_000_000), Link()
    for name in COLORS:
        assert simulate(name, 1, 1000, costs, link) == (1000 * (1e-3 + 1e-6), 1.0, 0.0)
        efficiency = [simulate(name, ranks, 100_000, costs, link)[1] for ranks in RANKS[1:]]
        assert max(efficiency) <= 1
    few, many = (simulate("sharded", 64, tiles, costs, link)[2] for tiles in (1_000, 100_000))
    assert few == many == 4 * (1 + 2 * 513)
    assert simulate("gather", 64, 100_000, costs, link)[2] == 2 * 100_000 * 512 * 4
    # One rank of two encodes in the paper's layout.
    assert simulate("gather", 2, 100_000, costs, link)[0] > 100_000 * 1e-3
    sharded, *others = (simulate(name, 512, 100_000, costs, link)[1] for name in ("sharded", "replicated", "gather"))
    assert sharded > 1.3 * max(others)
