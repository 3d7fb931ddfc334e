"""The workflows of GitHub Actions: valid, safe on GPUs of our own, and their shell steps run here on a recorded verdict."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").iterdir()}
GPUS = ["b200", "rtx-5090", "gb10", "h200"]

# What events give to expressions.
US, FORK = "us/fp4bench", "them/fp4bench"


def event(name, ref="refs/heads/main", sha="a1", inputs=None, **payload):
    github = {"event_name": name, "ref": ref, "sha": sha, "repository": US, "run_attempt": "1", "event": payload}
    return {"github": github, "inputs": inputs or {}}


def pull_request(number, head=US, sha="a1"):
    payload = {"pull_request": {"number": number, "head": {"repo": {"full_name": head}}}}
    return event("pull_request", ref=f"refs/pull/{number}/merge", sha=sha, **payload)


def dispatch(gpu, ref="refs/heads/main"):
    return event("workflow_dispatch", ref=ref, inputs={"gpu": gpu})


PUSH = event("push")


def evaluate(expression, contexts):
    """An expression's value. It knows what the workflows use: names, strings, ==, !=, &&, || and two functions."""

    def look(name):
        value = contexts
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return "" if value is None else value

    def as_python(token):
        text = token[0]
        if text.startswith("'"):
            return repr(text[1:-1].replace("''", "'"))
        return {"&&": " and ", "||": " or ", "fromJSON": text, "format": text}.get(text, f"look({text!r})")

    source = re.sub(r"'(?:[^']|'')*'|&&|\|\||[A-Za-z_][\w.]*", as_python, expression.strip())
    return eval(source, {"look": look, "fromJSON": json.loads, "format": lambda text, *values: text.format(*values)})


EXPRESSION = re.compile(r"\$\{\{((?:(?!\}\}).)*)\}\}", re.DOTALL)


def fill(text, contexts):
    """`text` with its expressions evaluated; the bare value where it is nothing but one."""
    if whole := EXPRESSION.fullmatch(text.strip()):
        return evaluate(whole[1], contexts)
    return EXPRESSION.sub(lambda found: str(evaluate(found[1], contexts)), text)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("github.event.missing.deeper || 'other'", "other"),
        ("github.ref == 'refs/heads/main' && 'a' || 'b'", "a"),
        ("github.ref != 'refs/heads/main'", False),
        ("fromJSON(format('[\"{0}\"]', github.sha))", ["a1"]),
        ("'it''s'", "it's"),
    ],
)
def test_expressions_are_evaluated_as_github_does(expression, value):
    assert evaluate(expression, PUSH) == value


# The rules: each yields a sentence for every violation.


def parse(text):
    return YAML(typ="safe", pure=True).load(text)


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def uses_of(workflow):
    return [x["uses"] for x in (*workflow["jobs"].values(), *steps(workflow)) if "uses" in x]


def is_ours(job):
    """Whether a job runs on a machine of our own."""
    return not (isinstance(job["runs-on"], str) and job["runs-on"].startswith("ubuntu-"))


def actions_are_pinned(text, workflow):
    for uses in uses_of(workflow):
        if not re.search(rf"uses: {re.escape(uses)} # v\d+\.\d+\.\d+$", text, re.MULTILINE):
            yield f"{uses} does not say its version"
        if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", uses):
            yield f"{uses} is not an action of GitHub pinned by commit"


def one_action_has_one_commit(text, workflow):
    """Over all workflows."""
    pins = {uses for other in (*WORKFLOWS.values(), text) for uses in re.findall(r"uses: (\S+)", other)}
    for uses in uses_of(workflow):
        if sum(pin.partition("@")[0] == uses.partition("@")[0] for pin in pins) > 1:
            yield f"{uses.partition('@')[0]} is used at two commits"


def the_token_can_only_read(text, workflow):
    if workflow.get("permissions") != {"contents": "read"}:
        yield "permissions are not those to read contents alone"
    for name, job in workflow["jobs"].items():
        if "permissions" in job:
            yield f"job {name} has permissions of its own"
    for step in steps(workflow):
        checks_out = step.get("uses", "").startswith("actions/checkout@")
        if checks_out and step.get("with", {}).get("persist-credentials") is not False:
            yield "checkout leaves its token in the clone"


def no_secret_is_used(text, workflow):
    if any(re.search(r"\bsecrets\b|github\.token\b", found) for found in EXPRESSION.findall(text)) or "secrets:" in text:
        yield "a secret is used"


def only_harmless_events_start_it(text, workflow):
    for name in workflow["on"].keys() - {"push", "pull_request", "workflow_dispatch"}:
        yield f"it starts on {name}"
    if workflow["on"].get("push") != {"branches": ["main"]}:
        yield "it starts on pushes to other branches than main"
    if "pull_request" not in workflow["on"]:
        yield "it does not start on pull requests"


def no_expression_becomes_shell(text, workflow):
    for step in steps(workflow):
        if "${{" in step.get("run", ""):
            yield f"step {step.get('name')!r} has an expression in its shell lines"


TRUSTED = {"matrix.gpu", "github.run_attempt"}


def actions_get_only_trusted_input(text, workflow):
    for step in steps(workflow):
        for expression in EXPRESSION.findall(json.dumps(step.get("with", {}))):
            if expression.strip() not in TRUSTED:
                yield f"an action gets {expression.strip()}"


def every_job_ends(text, workflow):
    for name, job in workflow["jobs"].items():
        limit = job.get("timeout-minutes")
        if not limit:
            yield f"job {name} has no timeout-minutes"
        elif any(step.get("timeout-minutes", 0) >= limit for step in job.get("steps", [])):
            yield f"a step of job {name} may run as long as the job"


def forks_stay_away_from_our_machines(text, workflow):
    for name, job in workflow["jobs"].items():
        if not is_ours(job):
            continue
        guard = job.get("if", "'always'")
        if evaluate(guard, pull_request(7, head=FORK)) or evaluate(guard, pull_request(7, head=None)):
            yield f"job {name} runs a fork's pull request on a machine of ours"
        for allowed in (PUSH, pull_request(7), dispatch("h200")):
            if not evaluate(guard, allowed):
                yield f"job {name} does not run on {allowed['github']['event_name']}"


def our_machines_take_one_job_at_a_time(text, workflow):
    for name, job in workflow["jobs"].items():
        if not is_ours(job):
            continue
        concurrency = {"group": "", **job.get("concurrency", {})}
        groups = {
            gpu: {fill(concurrency["group"], {"matrix": {"gpu": gpu}} | x) for x in (PUSH, pull_request(7), dispatch("all"))}
            for gpu in GPUS
        }
        if any(len(group) != 1 or "" in group for group in groups.values()):
            yield f"two runs of job {name} may share a GPU"
        if len(set.union(*groups.values())) != len(GPUS):
            yield f"job {name} waits for GPUs that it does not use"
        if concurrency.get("cancel-in-progress") is not False or concurrency.get("queue") != "max":
            yield f"job {name} is cancelled by a later one"


def only_a_pull_request_cancels_its_older_tests(text, workflow):
    if any(map(is_ours, workflow["jobs"].values())):
        return
    concurrency = workflow.get("concurrency", {"group": "${{ github.sha }}"})

    def group(contexts):
        return fill(concurrency["group"], contexts)

    if group(pull_request(7)) != group(pull_request(7, sha="b2")) or concurrency.get("cancel-in-progress") is not True:
        yield "a newer commit of a pull request does not cancel the older one's run"
    if group(pull_request(7)) == group(pull_request(8)) or group(PUSH) == group(event("push", sha="b2")):
        yield "runs cancel each other"


RULES = (
    *(actions_are_pinned, one_action_has_one_commit, the_token_can_only_read, no_secret_is_used, only_harmless_events_start_it),
    *(no_expression_becomes_shell, actions_get_only_trusted_input, every_job_ends, forks_stay_away_from_our_machines),
    *(our_machines_take_one_job_at_a_time, only_a_pull_request_cancels_its_older_tests),
)


def violations(text):
    workflow = parse(text)
    return [sentence for rule in RULES for sentence in rule(text, workflow)]


def test_there_are_two_workflows():
    assert WORKFLOWS.keys() == {"tests", "perf"}


@pytest.mark.parametrize("name", ["tests", "perf"])
def test_a_workflow_keeps_the_rules(name):
    assert violations(WORKFLOWS[name]) == []


CHECKOUT = "actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd"
GUARD = "github.event_name != 'pull_request' || github.event.pull_request.head.repo.full_name == github.repository"


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("perf", CHECKOUT, "actions/checkout@v6", "actions/checkout@v6 is not an action of GitHub pinned by commit"),
        ("perf", f"uses: {CHECKOUT} # v6.0.2", f"uses: {CHECKOUT}", f"{CHECKOUT} does not say its version"),
        ("perf", CHECKOUT, f"our/checkout@{'0' * 40}", f"our/checkout@{'0' * 40} is not an action of GitHub pinned by commit"),
        ("perf", CHECKOUT, f"actions/checkout@{'0' * 40}", "actions/checkout is used at two commits"),
        ("perf", "  contents: read", "  contents: write", "permissions are not those to read contents alone"),
        ("tests", "permissions:\n  contents: read\n", "", "permissions are not those to read contents alone"),
        ("perf", "    strategy:", "    permissions: write-all\n    strategy:", "job perf has permissions of its own"),
        ("perf", "persist-credentials: false", "fetch-depth: 1", "checkout leaves its token in the clone"),
        ("perf", "GPU: ${{ matrix.gpu }}", "GPU: ${{ secrets.GPU }}", "a secret is used"),
        ("tests", "  pull_request:\n", "  pull_request_target:\n", "it starts on pull_request_target"),
        ("tests", "  pull_request:\n", "", "it does not start on pull requests"),
        ("perf", "[main]", "[main, next]", "it starts on pushes to other branches than main"),
        ("tests", "run: .ci/run", "run: .ci/run ${{ github.head_ref }}", "step 'Run the tests, lint and types' has an"),
        ("tests", 'python-version: "3.11"', "python-version: ${{ github.head_ref }}", "an action gets github.head_ref"),
        ("tests", "timeout-minutes: 60", "name: a", "job tests has no timeout-minutes"),
        ("perf", "timeout-minutes: 50", "timeout-minutes: 60", "a step of job perf may run as long as the job"),
        ("perf", f"if: {GUARD}", "env: {}", "job perf runs a fork's pull request on a machine of ours"),
        ("perf", f"if: {GUARD}", "if: github.event_name != 'pull_request'", "job perf does not run on pull_request"),
        ("perf", f"if: {GUARD}", f"if: {GUARD.partition(' || ')[2]}", "job perf does not run on push"),
        ("perf", "group: gpu-${{ matrix.gpu }}", "group: gpu", "job perf waits for GPUs that it does not use"),
        ("perf", "group: gpu-${{ matrix.gpu }}", "group: ${{ matrix.gpu }}${{ github.ref }}", "two runs of job perf may share"),
        ("perf", "cancel-in-progress: false", "cancel-in-progress: true", "job perf is cancelled by a later one"),
        ("perf", "      queue: max\n", "", "job perf is cancelled by a later one"),
        ("tests", "cancel-in-progress: true", "cancel-in-progress: false", "a newer commit of a pull request does not cancel"),
        ("tests", "tests-${{ github.event.pull_request.number || github.sha }}", "tests-${{ github.ref }}", "runs cancel each"),
        ("tests", "tests-${{ github.event.pull_request.number || github.sha }}", "tests-${{ github.sha }}", "a newer commit"),
    ],
)
def test_a_planted_violation_is_found(name, old, new, sentence):
    assert old in WORKFLOWS[name]
    found = violations(WORKFLOWS[name].replace(old, new))
    assert any(said.startswith(sentence) for said in found), found


# GitHub's own schema.


def schema_check(*paths):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_workflows_fit_the_schema_of_github():
    done = schema_check(*(ROOT / ".github" / "workflows").iterdir())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    timeout-minutes:", "    timeout-minute:", "timeout-minute"),
        ("queue: max", "queue: all", "'all' is not one of"),
        ("contents: read", "contents: some", "'some' is not one of"),
    ],
)
def test_the_schema_check_finds_a_planted_error(old, new, said, tmp_path):
    assert old in WORKFLOWS["perf"]
    (tmp_path / "perf.yml").write_text(WORKFLOWS["perf"].replace(old, new), encoding="utf-8")
    done = schema_check(tmp_path / "perf.yml")
    assert done.returncode == 1
    assert said in done.stdout


# What the workflows do.


def test_the_hosted_runner_does_what_ci_does():
    shell = [step["run"] for step in steps(parse(WORKFLOWS["tests"])) if "run" in step]
    assert shell == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(",".join(re.findall(r"tox -e (\S+)", text)).split(",")) == {"lint", "gluon", "tests"}
    assert re.search(r"tox exec -e gluon .*-- mypy$", text, re.MULTILINE)
    assert "export FP4BENCH_TESTS=" in text
    assert "pytest tests {env:FP4BENCH_TESTS:}" in (ROOT / "tox.ini").read_text(encoding="utf-8")
    assert len(pins := re.findall(r"mypy==\S+", (ROOT / "tox.ini").read_text(encoding="utf-8"))) == 2
    assert len(set(pins)) == 1  # of `types`, and of the environment that stands in for it


JOB = parse(WORKFLOWS["perf"])["jobs"]["perf"]


@pytest.mark.parametrize(
    ("contexts", "gpus"), [(PUSH, GPUS), (pull_request(7), GPUS), (dispatch("all"), GPUS), *((dispatch(x), [x]) for x in GPUS)]
)
def test_an_event_chooses_the_gpus(contexts, gpus):
    assert fill(JOB["strategy"]["matrix"]["gpu"], contexts) == gpus


def test_one_may_ask_for_each_gpu():
    asked = parse(WORKFLOWS["perf"])["on"]["workflow_dispatch"]["inputs"]["gpu"]
    assert asked["type"] == "choice"
    assert asked["options"] == ["all", *GPUS]


def test_a_gpu_is_chosen_by_its_label():
    assert [fill(label, {"matrix": {"gpu": "gb10"}}) for label in JOB["runs-on"]] == ["self-hosted", "gpu", "gb10"]
    assert JOB["strategy"]["fail-fast"] is False


def test_the_records_are_kept_whatever_happened():
    (keep,) = [step for step in JOB["steps"] if step.get("uses", "").startswith("actions/upload-artifact@")]
    assert keep["if"] == "always()"
    assert keep["with"]["path"].split() == [".benchmarks/", "verdict.json"]
    assert keep["with"]["include-hidden-files"] is True
    # A name twice in one run is refused, and a job that is run again is the same run.
    assert fill(keep["with"]["name"], {"matrix": {"gpu": "h200"}} | PUSH) == "perf-h200-1"


# The shell steps of perf.yml in their order. Stand-ins: a python3 whose venv gets a tox, which leaves the recorded verdict.

REGRESSED = "gemm-mxfp4-w4a4-had64-eager-llama3.3-70b.qkv.tp1-m1024"
RECORDED = {
    "outcome": "regressed",
    "run": ".benchmarks/NVIDIA-H200/0001_run.json",
    "counts": {"REGRESSED": 1, "SAME": 1},
    "invalid": [],
    "cases": {
        REGRESSED: {
            "outcome": "REGRESSED",
            "reason": "slower",
            "change": 0.052,
            "low": 0.046,
            "high": 0.058,
            "mde": 0.012,
            "detail": "3 of 3 repetitions slower",
            "baseline_seconds": 0.000100,
            "seconds": 0.0001052,
        },
        "gemm-mxfp4-bf16-torch-llama3.3-70b.qkv.tp1-m1024": {
            "outcome": "SAME",
            "reason": "within",
            "change": 0.001,
            "low": -0.003,
            "high": 0.005,
            "mde": 0.012,
            "detail": "",
            "baseline_seconds": 0.000050,
            "seconds": 0.00005005,
        },
    },
}

PYTHON = """#!/bin/sh
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install tox") cp {tox} "${{0%/*}}/tox" && chmod +x "${{0%/*}}/tox" ;;
*) echo "unexpected: $*" >&2; exit 97 ;;
esac
"""

# As `fp4bench report --markdown FILE` writes it: the verdict, to stdout.
FP4BENCH = f"""#!/bin/sh
PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m fp4bench "$@"
"""

TOX = """#!/bin/sh
printf '%s\\n' "$@" > tox-arguments
mkdir -p .tox/perf/bin && cp {fp4bench} .tox/perf/bin/fp4bench && chmod +x .tox/perf/bin/fp4bench
{leave_the_verdict}
exit {code}
"""


@dataclass(frozen=True)
class Finished:
    """How the job ended: each step's exit code (None: not run), tox's arguments and the step summary."""

    codes: dict[str, int | None]
    tox: list[str]
    summary: str


@pytest.fixture
def perf_job(tmp_path):
    """Runs the shell steps of the job: `perf_job(contexts, ...)`, where tox ends with `tox_code` and leaves `verdict`."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return shlex.quote(str(path))

    def run(contexts, tox_code=0, verdict=RECORDED, gpu="h200", fp4bench=FP4BENCH):
        recorded = write("recorded.json", json.dumps(verdict))
        leave = f"cp {recorded} verdict.json" if verdict else ":"
        tox = TOX.format(fp4bench=write("fp4bench", fp4bench), leave_the_verdict=leave, code=tox_code)
        bin_folder, workspace = tmp_path / "bin", tmp_path / "workspace"
        bin_folder.mkdir()
        workspace.mkdir()
        write("bin/python3", PYTHON.format(tox=write("tox", tox)))
        files = {name: tmp_path / name for name in ("GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        codes = {}
        for step in (step for step in JOB["steps"] if "run" in step):
            if any(codes.values()) and step.get("if") != "always()":
                codes[step["name"]] = None
                continue
            added = reversed(files["GITHUB_PATH"].read_text(encoding="utf-8").splitlines())
            environment = {
                "PATH": ":".join([*added, str(bin_folder), "/usr/bin", "/bin"]),
                "RUNNER_TEMP": str(tmp_path / "runner temp"),
                "GITHUB_REF": contexts["github"]["ref"],
                **{name: str(path) for name, path in files.items()},
                **{name: fill(text, {"matrix": {"gpu": gpu}} | contexts) for name, text in step.get("env", {}).items()},
            }
            script = tmp_path / "step.sh"
            script.write_text(step["run"], encoding="utf-8")
            # As GitHub runs a step of `shell: bash`, and with -u: a variable that only this test's author has set stands out.
            command = ["bash", "--noprofile", "--norc", "-euo", "pipefail", str(script)]
            codes[step["name"]] = subprocess.run(command, cwd=workspace, env=environment, timeout=60).returncode
        arguments = workspace / "tox-arguments"
        return Finished(
            codes,
            arguments.read_text(encoding="utf-8").splitlines() if arguments.exists() else [],
            files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8"),
        )

    return run


SET_UP, TIME, SHOW = "Set up tox", "Time the cases and compare with the baseline", "Show the verdict"


def test_the_shell_of_the_steps_is_the_one_run_here():
    assert parse(WORKFLOWS["perf"])["defaults"]["run"]["shell"] == "bash"
    assert [step.get("shell") for step in JOB["steps"] if "run" in step] == [None] * 3


@pytest.mark.parametrize(
    ("contexts", "gate"),
    [
        (PUSH, "strict"),
        (dispatch("h200"), "strict"),
        (pull_request(7), "on"),
        (dispatch("h200", ref="refs/heads/next"), "on"),
        (dispatch("h200", ref="refs/tags/refs/heads/main"), "on"),
    ],
)
def test_only_main_fails_without_a_baseline(contexts, gate, perf_job):
    finished = perf_job(contexts, fp4bench="#!/bin/sh\n")
    assert finished.codes == {SET_UP: 0, TIME: 0, SHOW: 0}
    # --device cuda: where the GPU is gone, `auto` would time the CPU, find no baseline of it and pass.
    assert finished.tox == ["-e", "perf", "--", "--device", "cuda", f"--gate={gate}", "--verdicts=verdict.json"]


def test_the_command_that_tox_gets_exists(perf_job):
    environments = configparser.ConfigParser()
    environments.read(ROOT / "tox.ini")
    _, environment, _, *arguments = perf_job(PUSH, fp4bench="#!/bin/sh\n").tox
    assert f"testenv:{environment}" in environments
    asked = [sys.executable, "-m", "pytest", "--help"]
    known = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    assert [option for option in options if f"{option}=" not in known] == []


def test_the_verdict_is_in_the_summary(perf_job):
    finished = perf_job(PUSH, gpu="rtx-5090")
    heading, *lines = finished.summary.splitlines()
    assert heading == "## rtx-5090"
    (said,) = [line for line in lines if REGRESSED in line]
    assert "REGRESSED" in said


@pytest.mark.parametrize("code", [1, 6])
def test_a_failed_run_fails_the_job_and_shows_its_verdict(code, perf_job):
    finished = perf_job(pull_request(7), tox_code=code)
    assert finished.codes == {SET_UP: 0, TIME: code, SHOW: 0}
    assert REGRESSED in finished.summary


def test_a_run_without_a_verdict_says_so(perf_job):
    finished = perf_job(pull_request(7), tox_code=3, verdict=None)
    assert finished.codes == {SET_UP: 0, TIME: 3, SHOW: 0}
    assert finished.summary == "## h200\nNo verdict: the run ended before it had one. The log of this job says why.\n"


def test_a_verdict_that_cannot_be_shown_fails_the_job(perf_job):
    assert perf_job(pull_request(7), fp4bench="#!/bin/sh\nexit 2\n").codes == {SET_UP: 0, TIME: 0, SHOW: 2}
