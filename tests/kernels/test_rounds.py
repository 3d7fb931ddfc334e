"""What launches cost in rounds of tiles, and that those chosen by it are fast: beside what `fp4bench tune` has measured."""

import json
from collections import defaultdict
from math import exp, log
from pathlib import Path
from statistics import mean

import pytest

from fp4bench.devices import Device
from fp4bench.kernels import configs, rounds
from fp4bench.kernels.configs import Entry, Work
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.tuning.readings import Readings

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
RECORDS = Path(__file__).parents[2] / "baselines" / "NVIDIA-H200" / "kernels"
# All launches of four layers of Llama-3.3-70B at m = 256 and 2048, NVFP4 at 512 and 1024 too, by kernels as they are.
READINGS = ("2026-11-28_tune-10", "2026-11-28_tune-11", "2026-11-28_tune-12", "2026-11-28_tune-13")
WIDE = PrefillConfig(columns=256, streamed=False)


def entries():
    """Those of an H200 itself first."""
    return [entry for table in configs.tables_of(H200) for entry in table.entries]


@pytest.mark.parametrize(
    ("config", "m", "n", "by_hand"),
    [
        (WIDE, 1024, 8192, 2 * 128 * (256 + 72)),  # 64 by 4 tiles
        (WIDE, 1024, 5120, 2 * 128 * (256 + 72)),  # 40 by 4: the second round has 28
        (WIDE, 512, 2048, 128 * (256 + 72)),  # 32 tiles, and no CTA beyond
        (PrefillConfig(columns=256), 1024, 5120, (160 / 132 + 0.25) * 128 * (256 + 72)),
        (PrefillConfig(columns=256, pairs=True), 1024, 5120, (160 / 132 + 0.15) * 128 * (256 + 72)),
        (
            PrefillConfig(columns=256, streamed=True, tail=PrefillConfig(streamed=False)),
            1024,
            5120,
            128 * (256 + 72 + 128 + 72),
        ),
        (PrefillConfig(rows=64, warpgroups=1, ctas=2, streamed=False), 1024, 5120, 3 * 2 * 64 * (128 + 72)),  # 80 by 8 for 264
    ],
)
def test_costs_by_hand(config, m, n, by_hand):
    assert rounds.cost(config, "bf16", m, n, 8192, 132) == pytest.approx(by_hand)


def test_decoding_weighs_more_beside_fp8():
    whole, half = (rounds.cost(PrefillConfig(columns=c, streamed=False), "e4m3", 256, 1024, 8192, 132) for c in (256, 128))
    assert half / whole == (128 + 144) / (256 + 144)


def test_what_was_tuned_for_a_product_serves_it():
    own, *_ = configs.tables_of(H200)
    for entry in own.entries:
        assert configs.suited(entry.work, entries(), 132) == entry


def test_as_many_rows_as_have_the_same_tiles_are_served_by_the_launch_that_was_tuned_on_them():
    tuned = next(e for e in entries() if e.work == Work("e4m3", "mxfp4", 256, 10240, 8192))
    assert configs.suited(Work("e4m3", "mxfp4", 200, 10240, 8192), entries(), 132) == tuned


def test_a_launch_that_costs_less_goes_before_the_nearest():
    near = Entry(Work("bf16", "mxfp4", 1024, 8192, 8192), WIDE, 1e-4)
    tailed = PrefillConfig(columns=256, streamed=False, tail=PrefillConfig(streamed=False))
    far = Entry(Work("bf16", "mxfp4", 512, 10240, 8192), tailed, 1e-4)
    few = Entry(Work("bf16", "mxfp4", 128, 5120, 8192), tailed, 1e-4)
    qwen = Work("bf16", "mxfp4", 1024, 5120, 8192)
    assert configs.nearest(qwen, [near, far]) == near
    assert configs.suited(qwen, [near, far], 132) == far
    assert configs.suited(Work("bf16", "mxfp4", 1024, 8192, 4096), [near, far], 132) == near  # 1.94 rounds are as good as two
    assert configs.suited(qwen, [near, few], 132) == near  # tuned for rows that wait for memory
    assert configs.suited(qwen, [], 132) is None


def measured():
    """Seconds by work and launch, of care where there are."""
    found = defaultdict(dict)
    for name in READINGS:
        lines = [json.loads(line) for line in (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        readings = Readings(line for line in lines if "work" in line)
        for line in lines:
            if line.get("step") == "quick" and line["work"]["m"] > 128:
                work, launch = Work(**line["work"]), configs.launch_from_json(line["launch"])
                found[work][launch] = readings.careful(work).get(launch, line["seconds"])
    return found


def slower_than_best(choose):
    """By work, the time of the launch that is chosen from other layers' entries, over the best launch's."""
    found = {}
    for work, seconds in measured().items():
        others = [entry for entry in entries() if (entry.work.n, entry.work.k) != (work.n, work.k)]
        if (launch := choose(work, others).launch) in seconds:
            found[work] = seconds[launch] / min(seconds.values())
    return found


def geometric_mean(values):
    return exp(mean(map(log, values)))


def test_launches_of_other_layers_are_nearly_the_best():
    """Each layer served as if it had not been tuned."""
    by_rounds = slower_than_best(lambda work, others: configs.suited(work, others, 132))
    by_nearness = slower_than_best(configs.nearest)
    both = by_rounds.keys() & by_nearness.keys()
    assert len(both) > 20
    assert geometric_mean([by_rounds[work] for work in both]) < 1.02
    assert geometric_mean([by_nearness[work] for work in both]) > 1.05
    assert max(by_rounds.values()) < 1.15 < 1.3 < max(by_nearness.values())
    assert all(by_rounds[work] < by_nearness[work] + 0.01 for work in both)


def test_costs_foretell_the_time_of_layers_that_nobody_tuned():
    """W4A16 of Llama-3.1-8B and Qwen3-32B at m = 1024, in a run whose launches were those of the nearest shapes."""
    run = json.loads((RECORDS / "2026-11-28_all-providers.json").read_text(encoding="utf-8"))
    products = {
        Work("bf16", record["format"], record["m"], record["n"], record["k"]): bench["stats"]["median"]
        for bench in run["benchmarks"]
        if (record := bench["extra_info"])["provider"] == "triton" and record["mode"] == "w4a16" and record["m"] == 1024
        if record["model"] != "llama3.3-70b"
    }
    assert len(products) == 16
    for work, seconds in products.items():
        entry = configs.nearest(work, entries())
        tuned, here = (w.k * rounds.cost(entry.launch, "bf16", w.m, w.n, w.k, 132) for w in (entry.work, work))
        assert entry.seconds * here / tuned == pytest.approx(seconds, rel=0.06)
