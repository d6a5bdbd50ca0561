"""Who may import whom, and how long a file may be.

The directions of docs and design in one table. Run: python -m pytest tests/test_architecture.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

from tests.tracked_files import ROOT, tracked
from tests.waiting import LIMIT_S

PACKAGES = {
    "teacher_wire": ROOT / "proto" / "teacher_wire",
    "teacher_client": ROOT / "proto" / "teacher_client",
    "rollout_records": ROOT / "proto" / "rollout_records",
    "run_report": ROOT / "proto" / "run_report",
    "preflight": ROOT / "proto" / "preflight",
    "vllm_process": ROOT / "proto" / "vllm_process",
    "teacher_server": ROOT / "teacher_server",
    "student_trainer": ROOT / "student_trainer",
}
GENERATED = "teacher_wire.pb."

TORCH = "torch transformers safetensors vllm"
SIDES = "teacher_server student_trainer examples benchmarks tests"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the modules that match may import: nothing of `never`, or nothing but `only`."""

    modules: str
    never: str = ""
    only: str = ""
    but: str = ""
    """Modules that are exempt."""
    why: str


RULES = [
    # What both sides share.
    Rule(
        modules="teacher_wire.*",
        never=f"{TORCH} httpx teacher_client vllm_process {SIDES}",
        why="records, errors and messages know nobody",
    ),
    Rule(
        modules="teacher_wire.drift",
        only="numpy teacher_wire.drift_metrics teacher_wire.records",
        why="pure: server, losses and reports all ask it",
    ),
    Rule(modules="teacher_wire.columns", only="numpy", why="pure: what a column is"),
    Rule(
        modules="teacher_wire.report_columns",
        only="teacher_wire.columns teacher_wire.records",
        why="names, of server and client alike",
    ),
    Rule(
        modules="teacher_wire.id_ranges", only="numpy teacher_wire.errors", why="pure: sets of ids"
    ),
    Rule(modules="teacher_wire.vocabulary", only="typing", why="pure: both sides compare by it"),
    Rule(
        modules="teacher_wire.drift_metrics",
        only="numpy teacher_wire.errors",
        why="pure: a metric is a rule and its constants",
    ),
    Rule(
        modules="teacher_client.*",
        never=f"{TORCH} pyarrow vllm_process {SIDES}",
        why="other trainers use it without ours",
    ),
    Rule(
        modules="teacher_client.*",
        never="pandas",
        but="teacher_client.frames",
        why="an extra: one file asks for it",
    ),
    Rule(
        modules="teacher_client.rollout_items",
        only="numpy teacher_client.retry teacher_wire.errors",
        why="rollouts of any form, no transport",
    ),
    Rule(
        modules="teacher_client.retry",
        only="teacher_wire.errors",
        why="whether to try again is independent of transport",
    ),
    Rule(
        modules="teacher_client.agreement",
        only="numpy teacher_wire.errors teacher_wire.records",
        why="rows are compared, however they came",
    ),
    Rule(modules="teacher_client.rendezvous", never="grpc numpy teacher_wire", why="pure"),
    Rule(
        modules="rollout_records.*",
        only="numpy pyarrow rollout_records teacher_wire.drift teacher_wire.drift_metrics "
        "teacher_wire.records",
        why="a format: page, trainer and notebooks read it without each other",
    ),
    Rule(
        modules="run_report.*",
        only="numpy pyarrow matplotlib jinja2 markupsafe tokenizers rollout_records run_report",
        why="pages from figures, whoever has them",
    ),
    Rule(
        modules="preflight.*",
        only="packaging rich huggingface_hub preflight",
        why="machines and files, before anything is loaded",
    ),
    Rule(
        modules="teacher_client.reaching",
        never="grpc numpy teacher_wire teacher_client.stream",
        why="a connection by hand: what gRPC does not tell",
    ),
    Rule(
        modules="vllm_process.*",
        never=f"{TORCH} grpc teacher_wire {SIDES}",
        why="processes, not models",
    ),
    Rule(
        modules="*",
        never="vllm",
        but="teacher_server.engine.vllm_engine teacher_server.engine.token_scorer "
        "student_trainer.rollouts.samplers.vllm_sampler "
        "student_trainer.rollouts.samplers.vllm_reload "
        "student_trainer.rollouts.samplers.vllm_adapter "
        "student_trainer.rollouts.samplers.vllm_transfer",
        why="six files know vllm",
    ),
    Rule(
        modules="*",
        never="teacher_wire.pb",
        but="teacher_wire.codec teacher_wire.batches teacher_wire.status teacher_server.rpc "
        "teacher_server.process.app teacher_server.testing teacher_client.client "
        "teacher_client.stream",
        why="messages stay at the edge",
    ),
    # The trainer, from the ground up.
    Rule(modules="student_trainer.*", never="teacher_server examples tests", why="one way only"),
    Rule(
        modules="student_trainer.losses.*",
        only="torch pydantic student_trainer.losses student_trainer.settings.loss "
        "student_trainer.settings.weights teacher_wire.drift",
        why="formulas: their constants, no run, no records, no grpc; reliability is the server's",
    ),
    Rule(
        modules="student_trainer.settings.*",
        never=f"{TORCH} grpc teacher_client student_trainer",
        why="show-config starts at once",
    ),
    *(
        Rule(
            modules=f"student_trainer.settings.{name}",
            only="pydantic student_trainer.settings.section",
            why="a method's constants and their ranges, below formulas and configuration alike",
        )
        for name in ("budget", "loss", "weights")
    ),
    Rule(
        modules="student_trainer.vocabulary",
        never=f"{TORCH} grpc teacher_client teacher_wire.codec",
        why="it is given tokens, and says which are shared",
    ),
    Rule(modules="student_trainer.records", never=f"{TORCH} grpc", why="numpy until the learner"),
    *(
        Rule(modules=f"student_trainer.{name}", only=known, why="everybody may know it")
        for name, known in (
            ("diagnostics.step_report", "typing"),
            ("process.stopping", "vllm_process.children"),
        )
    ),
    Rule(
        modules="student_trainer.train_state",
        only="torch student_trainer.errors student_trainer.process.writing "
        "student_trainer.best_checkpoints",
        why="parts are known by what they say",
    ),
    Rule(
        modules="student_trainer.*",
        never="student_trainer.learner.optim student_trainer.learner.batch",
        but="student_trainer.learner student_trainer.assembly.from_settings",
        why="nobody but the learner touches model and optimiser",
    ),
    Rule(modules="student_trainer.diagnostics.*", never=f"{TORCH} grpc", why="pure"),
    Rule(
        modules="student_trainer.learner.*",
        never="vllm grpc teacher_client student_trainer.rollouts student_trainer.recording",
        why="it learns from rollouts, however they came",
    ),
    Rule(
        modules="student_trainer.rollouts.*",
        never="grpc teacher_client teacher_wire.pb teacher_wire.codec student_trainer.recording",
        why="it knows protocols",
    ),
    *(
        Rule(modules=f"student_trainer.rollouts.{name}", never=TORCH, why="numpy alone")
        for name in ("generation", "rollout", "stream", "budget", "weight_sync", "samplers.base")
    ),
    Rule(
        modules="student_trainer.rollouts.*",
        never="student_trainer.rollouts.samplers.vllm_sampler "
        "student_trainer.rollouts.samplers.hf_sampler "
        "student_trainer.rollouts.samplers.hf_batched_sampler",
        why="assembly chooses implementations",
    ),
    Rule(
        modules="student_trainer.evaluation.*",
        never=f"{TORCH} grpc teacher_client teacher_wire.pb teacher_wire.codec "
        "student_trainer.learner student_trainer.losses student_trainer.recording",
        why="it is given a sampler, sessions and a tokenizer",
    ),
    *(
        Rule(modules=f"student_trainer.evaluation.{name}", only=only, why=why)
        for name, only, why in (
            ("answers", "typing", "pure"),
            ("passes", "numpy", "pure"),
            (
                "math_answers",
                "math_verify student_trainer.evaluation.answers",
                "it runs in a process that imports nothing else",
            ),
            (
                "math_worker",
                "math_verify student_trainer.evaluation.math_answers",
                "likewise",
            ),
        )
    ),
    Rule(
        modules="*",
        never="math_verify",
        but="student_trainer.evaluation.math_answers student_trainer.evaluation.math_worker",
        why="two files know math-verify",
    ),
    Rule(
        modules="student_trainer.recording.*",
        never="grpc teacher_client student_trainer.learner student_trainer.rollouts",
        why="it is told, it does not ask",
    ),
    Rule(
        modules="student_trainer.*",
        never="student_trainer.settings",
        but="student_trainer.cli student_trainer.assembly student_trainer.settings "
        "student_trainer.losses student_trainer.rollouts.budget",
        why="values are passed, not settings; a method has its own constants",
    ),
    Rule(
        modules="student_trainer.*",
        never="student_trainer.assembly student_trainer.train",
        but="student_trainer.train student_trainer.cli student_trainer.assembly",
        why="nothing below the loop knows the loop",
    ),
    # The server, from the ground up.
    Rule(
        modules="teacher_server.*",
        never="student_trainer examples tests",
        why="one way only",
    ),
    Rule(
        modules="teacher_server.*",
        never="teacher_client",
        but="teacher_server.process.scorers teacher_server.process.analysis",
        why="a server asks no other; the command that analyses a file does",
    ),
    Rule(
        modules="teacher_server.engine.*",
        never="teacher_server grpc fastapi",
        why="an engine knows rows, not the service",
    ),
    Rule(modules="teacher_server.engine.base", never=TORCH, why="the seam is free"),
    Rule(
        modules="teacher_server.*",
        never=TORCH,
        but="teacher_server.engine teacher_server.process.loading",
        why="scoring is behind the engine protocol",
    ),
    Rule(
        modules="teacher_server.*",
        never="teacher_server.engine",
        but="teacher_server.engine teacher_server.process teacher_server.testing",
        why="only its protocol is known",
    ),
    Rule(
        modules="teacher_server.access.*",
        never="grpc fastapi uvicorn teacher_server.rpc teacher_server.http",
        but="teacher_server.access.tls",
        why="who may call is independent of transport",
    ),
    Rule(
        modules="teacher_server.admission.*",
        never="grpc fastapi teacher_server.rpc teacher_server.http teacher_server.scoring",
        why="queries and tenants, no transport",
    ),
    *(
        Rule(modules=f"teacher_server.admission.{name}", only="typing", why="pure: a law")
        for name in ("fair_queue", "pace")
    ),
    Rule(
        modules="teacher_server.admission.tenant_limits",
        only="teacher_server.access.tenants teacher_wire.errors",
        why="pure: limits as arithmetic",
    ),
    Rule(
        modules="teacher_server.scoring.*",
        never="grpc fastapi teacher_server.rpc teacher_server.http teacher_server.admission",
        why="sessions know no transport",
    ),
    Rule(
        modules="teacher_server.metrics.*",
        never="fastapi teacher_server.rpc teacher_server.http teacher_server.scoring",
        why="it is told, it does not ask",
    ),
    Rule(
        modules="teacher_server.analyze.*",
        never="grpc fastapi teacher_server.rpc teacher_server.http teacher_server.scoring",
        why="rows of a file, and what came of them",
    ),
    Rule(modules="teacher_server.rpc.*", never="fastapi uvicorn teacher_server.http", why="gRPC"),
    Rule(
        modules="teacher_server.rpc.interceptors",
        never="teacher_server.access teacher_server.settings teacher_wire.pb teacher_wire.codec",
        why="it decodes nothing and knows no secret",
    ),
    Rule(
        modules="teacher_server.http.*",
        never="grpc teacher_wire.pb teacher_wire.codec teacher_server.rpc",
        why="HTTP only",
    ),
    Rule(
        modules="teacher_server.http.recordings",
        never="fastapi starlette uvicorn",
        why="it reads files, whoever asks",
    ),
    Rule(
        modules="teacher_server.*",
        never="teacher_server.process",
        but="teacher_server.cli teacher_server.process teacher_server.testing",
        why="one composition root, which tests use too",
    ),
]
SAME_LAYER = {
    "teacher_server.engine.*": "teacher_server.engine",
    "student_trainer.settings.*": "student_trainer.settings student_trainer.errors",
    "teacher_server.*": "teacher_server.engine.base",
}
"""What a `never` on the parent package still allows."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 150
LONG_FILES: dict[str, str] = {}
"""Exceptions: path and reason."""
LONG_FUNCTIONS: dict[str, str] = {}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def module_files() -> Iterator[tuple[str, Path]]:
    """Names and paths of the hand-written modules of the three packages."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__")
            if not f"{name}.".startswith(GENERATED):
                yield name, path


MODULES = dict(module_files())


@cache
def imports(name: str) -> frozenset[str]:
    """Absolute names of the modules that a module imports, anywhere but under TYPE_CHECKING."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import module` imports the module.
            found |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            }
    return frozenset(found)


def within(module: str, names: str) -> bool:
    """Whether a module is one of the names or below one."""
    return any(f"{module}.".startswith(f"{name}.") for name in names.split())


def violations(rule: Rule) -> list[str]:
    """Imports that the rule forbids."""
    found = []
    for name in MODULES:
        if not fnmatchcase(name, rule.modules) or within(name, rule.but):
            continue
        for imported in sorted(imports(name)):
            if rule.only:
                standard = imported.split(".")[0] in sys.stdlib_module_names
                bad = not standard and not within(imported, rule.only)
            else:
                bad = within(imported, rule.never) and not within(
                    imported, SAME_LAYER.get(rule.modules, "")
                )
            if bad:
                found.append(f"{name} imports {imported}")
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.modules}: {r.why}")
def test_imports_go_the_right_way(rule: Rule) -> None:
    assert any(fnmatchcase(name, rule.modules) for name in MODULES), "the rule matches nothing"
    assert violations(rule) == []


def test_rules_name_modules_that_exist() -> None:
    ours = [
        name
        for rule in RULES
        for name in f"{rule.never} {rule.only} {rule.but}".split()
        if name.split(".")[0] in PACKAGES
    ]
    known = {*MODULES, *PACKAGES, "teacher_wire.pb"}
    assert [name for name in ours if name not in known] == []


def test_a_wrong_import_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "rollout.py"
    source.write_text("def f():\n    from vllm.outputs import X\n    from ..losses import inputs\n")
    monkeypatch.setitem(MODULES, "student_trainer.rollouts.rollout", source)
    imports.cache_clear()
    try:
        assert imports("student_trainer.rollouts.rollout") == {
            "vllm.outputs",
            "student_trainer.losses.inputs",
        }
        rules = [rule for rule in RULES if rule.modules == "student_trainer.rollouts.rollout"]
        assert violations(rules[0]) == ["student_trainer.rollouts.rollout imports vllm.outputs"]
    finally:
        imports.cache_clear()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("teacher_client.client", "torch vllm transformers"),
        ("student_trainer.rollouts.rollout", "torch vllm transformers"),
        ("student_trainer.cli", "torch vllm transformers"),
        ("teacher_server.rpc.service", "torch vllm transformers fastapi"),
        ("teacher_server.http.app", "torch vllm transformers"),
        ("teacher_server.cli", "torch vllm transformers fastapi"),
        ("teacher_server.process.doctor", "torch vllm transformers fastapi"),
        ("student_trainer.assembly.doctor", "torch vllm transformers"),
        ("preflight.software", "torch vllm transformers grpc"),
        ("teacher_server.process.app", "torch vllm transformers"),
    ],
)
def test_module_does_not_bring_these_along(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*set(sys.modules) & set({absent.split()!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_module_is_a_dumping_ground() -> None:
    names = {part for name in tracked("*.py") for part in Path(name).with_suffix("").parts}
    assert names & FORBIDDEN_NAMES == set()


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES.values()
    }
    long = {name for name, length in lengths.items() if length > MAX_FILE_LINES}
    assert long == set(LONG_FILES)


@pytest.mark.parametrize(
    ("pattern", "limit"),
    [("tests/*.py", 550), ("*.proto", 500), ("teacher_server/http/page/*", 250)],
)
def test_tests_and_the_contract_are_not_much_longer(pattern: str, limit: int) -> None:
    lengths = {
        name: len((ROOT / name).read_text("utf-8").splitlines()) for name in tracked(pattern)
    }
    assert {name: length for name, length in lengths.items() if length > limit} == {}
    assert lengths


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by name, and refuses the second where both are collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []


def test_functions_are_short() -> None:
    long = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.add(f"{path.relative_to(ROOT)}:{node.name}")
    assert long == set(LONG_FUNCTIONS)


def test_the_loop_is_on_one_screen() -> None:
    source = (ROOT / "student_trainer" / "train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LOOP_LINES
    assert source.count("for step in range(") == 1
