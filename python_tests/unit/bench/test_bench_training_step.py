"""The training-step benchmark on tiny sizes: rows do the same work, peaks are what was allocated, pictures appear."""

import dataclasses
import importlib
import json
import math
import sys

import pytest
import torch
from _paths import ROOT
from _published import published

from excessmtl_ext import _extension

for package in ("matplotlib", "rich", "torchvision"):
    pytest.importorskip(package, reason=f"the benchmarks need {package}")

sys.path.insert(0, str(ROOT / "bench"))
try:
    run = importlib.import_module("training_step.run")
    rows = importlib.import_module("training_step.rows")
    steps = importlib.import_module("training_step.steps")
    workloads = importlib.import_module("training_step.workloads")
    measurement = importlib.import_module("training_step.measurement")
    timing = importlib.import_module("timing")
finally:
    sys.path.pop(0)

needs_ops = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)
ROWS = rows.ROWS
CPU = torch.device("cpu")
RUNNABLE = [key for key, row in ROWS.items() if row.missing() is None]


def make_template(key="mlp", device=CPU):
    return workloads.Template(workloads.named_workloads(quick=True)[key], device)


@pytest.fixture(scope="module")
def template():
    return make_template()


def steps_of(template, key, num_steps=3):
    step = steps.Step(ROWS[key], workloads.Problem(template))
    for _ in range(num_steps):
        step()
    return step.problem


# ---- rows


@pytest.mark.parametrize("key", RUNNABLE)
def test_every_row_trains_the_encoder_and_its_heads(template, key):
    problem = steps_of(template, key)
    trained = problem.heads if ROWS[key].trains_all_heads else problem.heads[:1]
    moved = [*problem.shared, *(parameter for head in trained for parameter in head)]
    before = workloads.Problem(template)
    initial = [*before.shared, *(parameter for head in before.heads for parameter in head)]
    for parameter, old in zip(moved, initial[: len(moved)], strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("key", [key for key in ROWS if ROWS[key].is_captured])
def test_a_replayed_step_trains_as_one_that_is_launched(key):
    workload = workloads.named_workloads(quick=True)["mlp"]
    template = workloads.Template(workload, torch.device("cuda"))
    replayed = steps.make_step(ROWS[key], workloads.Problem(template))
    launched = steps.Step(ROWS[key], workloads.Problem(template))
    for _ in range(5):
        replayed()
    for _ in range(workloads.NUM_BATCHES + 5):  # before it was recorded, each batch was run once
        launched()
    for mine, theirs in zip(
        replayed.problem.model.parameters(), launched.problem.model.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", [key for key in RUNNABLE if ROWS[key].agrees_with])
def test_rows_that_compute_the_same_leave_the_same_gradients(template, key):
    row = ROWS[key]
    assert steps.difference(row, ROWS[row.agrees_with], template) < 1e-4


@pytest.mark.parametrize(
    "key",
    ["multimnist", pytest.param("resnet18", marks=pytest.mark.slow), "segnet", "transformer"],
)
def test_exact_agrees_with_the_published_algorithm_on_every_network(key, device):
    template = make_template(key, device)
    assert steps.difference(ROWS["exact"], ROWS["eager"], template) < 1e-3


def test_the_check_sees_weights_and_not_only_uniform_ones(template):
    """With a check that only looked at uniform weights these two would agree."""
    with pytest.raises(RuntimeError, match=r"Expected row `exact` to leave the gradients of row"):
        steps.difference(ROWS["exact"], dataclasses.replace(_mean_row(), key="mean"), template)


def _mean_row():
    def fill(problem):
        return lambda features, losses: torch.stack(losses).mean().backward()

    return rows.Row("mean", "mean", "peer", fill)


def test_the_check_sees_heads(template):
    with pytest.raises(RuntimeError, match=r"they differ by"):
        steps.difference(ROWS["official"], ROWS["exact"], template)


def test_a_row_that_leaves_a_parameter_out_is_an_error(template):
    def only_first(problem):
        return lambda features, losses: losses[0].backward()

    row = rows.Row("lazy", "lazy", "ours", only_first)
    with pytest.raises(
        RuntimeError, match=r"row `lazy` to fill `.grad` of all parameters, but 12 "
    ):
        list(steps.filled_grads(row, template))


def test_a_row_that_changes_its_start_is_an_error(template):
    def with_other_parameters(problem):
        torch.nn.init.zeros_(problem.shared[0])
        return lambda features, losses: torch.stack(losses).sum().backward()

    def with_half_of_adam(problem):
        problem.optimizer = torch.optim.Adam(problem.shared, **workloads.ADAM)
        return lambda features, losses: torch.stack(losses).sum().backward()

    for make in (with_other_parameters, with_half_of_adam):
        row = rows.Row("cheat", "cheat", "ours", make)
        with pytest.raises(RuntimeError, match=r"Expected row `cheat` to start from"):
            list(steps.filled_grads(row, template))


def test_the_lower_bound_gives_heads_their_own_gradient_and_the_encoder_the_last_tasks(template):
    problem = workloads.Problem(template)
    fill = ROWS["lower_bound"].make(problem)
    fill(*problem.forward())
    other = workloads.Problem(template)
    _, losses = other.forward()
    for task, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, [*other.shared, *other.heads[task]], retain_graph=True)
        found = [parameter.grad for parameter in [*problem.shared, *problem.heads[task]]]
        start = 0 if task == len(losses) - 1 else len(other.shared)
        torch.testing.assert_close(found[start:], list(expected[start:]), rtol=0, atol=0)


def test_a_missing_package_is_a_reason_and_not_an_error(template):
    row = dataclasses.replace(ROWS["eager"], packages=("no_such_package",))
    assert run._prepare(row, template).reason == "not installed: no_such_package"


def test_a_peer_that_fails_is_recorded_and_a_row_of_ours_that_fails_ends_the_run(template):
    def fails(problem):
        raise ValueError("cannot batch this layer\nand more")

    peer = rows.Row("broken", "broken", "peer", fails)
    assert run._prepare(peer, template).reason == "ValueError: cannot batch this layer"
    with pytest.raises(ValueError, match="cannot batch this layer"):
        run._prepare(dataclasses.replace(peer, kind="ours"), template)


@pytest.mark.parametrize("count", workloads.PARAM_COUNTS)
def test_the_sweep_has_the_parameters_it_says(count):
    (workload,) = workloads.param_sweep([count], quick=False)
    with torch.device("meta"):
        encoder = workload.make_model().encoder
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(count, rel=0.03)


def test_the_task_sweep_varies_the_tasks_alone():
    few, many = workloads.task_sweep([2, 40], quick=True)
    assert (few.num_tasks, many.num_tasks) == (2, 40)
    sizes = [workloads.Template(workload, CPU).num_shared for workload in (few, many)]
    assert sizes[0] == sizes[1]


# ---- time and memory


def test_samples_are_means_over_whole_periods(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls = {"plain": 0, "every third": 0}

    def plain():
        calls["plain"] += 1
        clock[0] += 1.0

    def every_third():
        clock[0] += 7.0 if calls["every third"] % 3 == 0 else 1.0
        calls["every third"] += 1

    timings = timing.measure_steps(
        {"plain": plain, "every third": every_third},
        CPU,
        periods={"every third": 3},
        rounds=4,
        budget_s=1e9,
    )
    assert timings["plain"].samples == (1.0,) * 4
    assert timings["every third"].samples == (3.0,) * 4


def test_a_spent_budget_ends_the_rounds_but_not_before_the_fewest():
    timings = timing.measure_steps(
        {"a": lambda: None}, CPU, periods={}, rounds=9, budget_s=0.0, min_rounds=2
    )
    assert len(timings["a"].samples) == 2


@needs_ops
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # of torch 2.10
def test_the_peak_shows_state_and_gradients():
    template = workloads.Template(workloads.param_sweep([10**8], quick=True)[0], CPU)
    peaks = {key: run.peak_bytes(ROWS[key], template) for key in ("uniform", "exact", "streaming")}
    sizes = 4 * template.num_shared
    num_tasks = len(template.losses)
    beyond_plain = {key: (peaks[key] - peaks["uniform"]) / sizes for key in ("exact", "streaming")}
    # S is T * P. Exact also holds T gradients where plain holds one; streaming's buffers fit into what Adam's
    # temporaries need later, so that its peak is plain's and S.
    assert beyond_plain["exact"] == pytest.approx(2 * num_tasks - 1, rel=0.15)
    assert num_tasks <= beyond_plain["streaming"] < num_tasks + 2


# ---- the command


OPTIONS = [
    *("--quick", "--rounds", "2", "--workloads", "mlp", "tasks", "parameters"),
    *("--rows", "uniform", "lower_bound", "exact", "update_every_10", "moml", "eager"),
    *("--task-counts", "2", "3", "--param-counts", "1000000", "10000000"),
]


@pytest.mark.slow
@needs_ops
def test_a_run_leaves_a_complete_folder_and_goes_on_where_it_stopped(tmp_path, capsys):
    output = tmp_path / "out"
    run.main([*OPTIONS, "--output", str(output)])
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "environment.json", "measurements.json", "README.md"),
        *("cost_against_tasks.png", "cost_against_parameters.png"),
    }
    found = json.loads((output / "measurements.json").read_text())["measurements"]
    keys = ["mlp", "tasks_2", "tasks_3", "parameters_1000000", "parameters_10000000"]
    assert [m["key"] for m in found] == keys
    in_sweeps = {"uniform", "lower_bound", "exact", "update_every_10", "eager"}
    assert set(found[0]["rows"]) == in_sweeps | {"moml"}
    assert all(set(m["rows"]) == in_sweeps for m in found[1:])
    for m in found:
        assert m["rows"]["eager"]["difference"] < 1e-3
        for row in m["rows"].values():
            assert row["rounds"] == 2
            assert row["median_ms"] >= row["min_ms"] > 0
            assert row["peak_bytes"] > 4 * m["num_params"]
        assert m["rows"]["uniform"]["ratio_to_uniform"] == 1.0
        assert set(m["load_averages"]) == {"before", "after"}
    readme = (output / "README.md").read_text()
    assert "mlp: ExcessMTL / lower bound" in readme
    config = json.loads((output / "config.json").read_text())
    assert (config["rounds"], config["adam"]["foreach"]) == (2, True)

    before = (output / "measurements.json").read_text()
    capsys.readouterr()
    run.main([*OPTIONS, "--output", str(output)])
    assert capsys.readouterr().out.count("measured already") == 5
    assert (output / "measurements.json").read_text() == before

    single = [*OPTIONS, "--workloads", "mlp", "--rounds", "3", "--output", str(output)]
    run.main(single)
    assert "Starting anew: rounds changed" in capsys.readouterr().out
    found = json.loads((output / "measurements.json").read_text())["measurements"]
    assert [m["rows"]["exact"]["rounds"] for m in found] == [3]


def test_a_device_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        run.main(["--device", "cuda"])


def test_redraw_wants_measurements(tmp_path):
    with pytest.raises(SystemExit, match=r"Expected measurements.json in `--output`"):
        run.main(["--redraw", "--output", str(tmp_path)])


# ---- pictures


SPEEDS = {"uniform": 0.5, "lower_bound": 1.0, "exact": 1.04, "streaming": 1.2, "eager": 1.5}
SPEEDS |= {"torchjd_excess": 1.9, "torchjd_excess_sequential": 2.1}


def made_up_measurement(key, section, num_tasks, num_shared, speeds=SPEEDS):
    """Times that grow with T and P, as a file of measurements has them."""
    cost = 1e-3 * num_tasks * (1 + num_shared / 1e6)
    rows = {
        name: {
            "label": ROWS[name].label if name in ROWS else name,
            "samples_ms": [1e3 * cost * factor * (1 + 0.02 * i) for i in range(5)],
            "peak_bytes": int(4 * num_shared * (3 + num_tasks * factor)),
        }
        for name, factor in speeds.items()
    }
    rows["torchjd_upgrad"] = {"label": "torchjd UPGrad", "reason": "not installed: quadprog"}
    return {
        "key": key,
        "title": f"made up {key}",
        "section": section,
        "num_tasks": num_tasks,
        "num_shared": num_shared,
        "num_params": num_shared + 10,
        "load_averages": {},
        "rows": rows,
    }


ENVIRONMENT = {
    **{"cpu": "a processor", "cpu_count": 2, "num_threads": 1, "last_level_cache_mib": 32.0},
    **{"cpu_capability": "avx2", "torch": "2.14", "python": "3.11", "commit": "0" * 40},
    **{"is_dirty": False, "date": "2026-11-22", "command": "python bench", "wall_s": 1.0},
    "load_averages": {"before": [0.1], "after": [0.2]},
}


def write_made_up(folder, speeds=SPEEDS):
    measurements = [
        made_up_measurement("mlp", "workloads", 7, 36_000, speeds),
        *(
            made_up_measurement(f"tasks_{t}", "tasks", t, 10_000, speeds)
            for t in (2, 5, 10, 20, 40)
        ),
        *(
            made_up_measurement(f"parameters_{p}", "parameters", 4, p, speeds)
            for p in (10**4, 10**5, 10**6, 5 * 10**6, 25 * 10**6)
        ),
    ]
    content = {"circumstances": {}, "measurements": measurements}
    (folder / "measurements.json").write_text(json.dumps(content))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))


def test_pictures_and_readme_are_drawn_from_a_file_of_measurements(tmp_path):
    write_made_up(tmp_path)
    run.main(["--redraw", "--output", str(tmp_path)])
    for name in ("cost_against_tasks.png", "cost_against_parameters.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 20_000
    readme = (tmp_path / "README.md").read_text()
    assert (
        "mlp: ExcessMTL / lower bound: 1.04 (1.04-1.04), fastest samples 1.04, goal at most 1.05: met"
        in readme
    )
    assert "mlp: fastest package (torchjd ExcessMTL) / ExcessMTL: 1.83 (1.83-1.83)" in readme
    assert (
        "mlp: plain PyTorch / ExcessMTL: 1.44 (1.44-1.44), fastest samples 1.44, no goal" in readme
    )
    assert "torchjd UPGrad: not installed: quadprog (mlp, tasks_2" in readme
    assert "![cost against tasks](cost_against_tasks.png)" in readme


def test_a_goal_that_is_missed_is_called_missed(tmp_path):
    write_made_up(tmp_path, {**SPEEDS, "exact": 1.2})
    run.main(["--redraw", "--output", str(tmp_path)])
    readme = (tmp_path / "README.md").read_text()
    assert (
        "mlp: ExcessMTL / lower bound: 1.2 (1.2-1.2), fastest samples 1.2, goal at most 1.05: missed"
        in readme
    )


def test_rows_of_a_later_version_are_drawn_too(tmp_path):
    write_made_up(tmp_path, {**SPEEDS, "a mode to come": 0.8})
    run.main(["--redraw", "--output", str(tmp_path)])
    assert "a mode to come" in (tmp_path / "README.md").read_text()


def test_a_measurement_survives_its_file():
    facts = made_up_measurement("tasks_5", "tasks", 5, 1000)
    m = measurement.Measurement.from_json(facts)
    again = measurement.Measurement.from_json(json.loads(json.dumps(m.to_json())))
    assert again.labels == m.labels
    assert again.rows["torchjd_upgrad"] == m.rows["torchjd_upgrad"]
    for key in SPEEDS:
        assert again.rows[key].peak_bytes == m.rows[key].peak_bytes
        assert math.isclose(again.timing(key).median_s, m.timing(key).median_s)


def test_a_mode_is_one_more_row(template):
    def with_momentum(problem):
        balancer = published(problem.shared, num_tasks=problem.num_tasks, gradient_momentum=0.5)
        return lambda features, losses: balancer.backward(losses)

    row = rows.Row("momentum", "ExcessMTL, momentum", "ours", with_momentum)
    effort = run.Effort(rounds=1, budget_s=0.0)
    workload = workloads.named_workloads(quick=True)["mlp"]
    compared = [ROWS["lower_bound"], row]
    m = run.run_workload(workload, compared, CPU, effort, run.Console(quiet=True))
    assert m.ratio("momentum", "lower_bound") is not None
    assert m.rows["momentum"].peak_bytes is not None
