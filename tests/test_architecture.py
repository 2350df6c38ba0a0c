"""The house: imports run one way, and importing the package is quick and light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "s4audio"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
SEES = {  # what each part may import of this package
    "files": set(),
    "ssm": set(),
    "card": set(),
    "audio": {"files"},
    "losses": {"audio"},
    "layers": {"ssm"},
    "models": {"audio", "ssm", "layers", "losses"},
    "metrics": {"audio", "losses", "__version__"},
    "data": {"files", "audio"},
    "report": {"files", "audio", "losses"},
    "checkpoint": {"files", "card", "layers", "models", "metrics"},
    "hub": {"checkpoint"},
    "tasks": {"files", "audio", "losses", "layers", "models", "metrics", "checkpoint", "report"},
    "cli": {
        "files",
        "card",
        "ssm",
        "audio",
        "losses",
        "layers",
        "models",
        "metrics",
        "data",
        "tasks",
        "checkpoint",
        "report",
        "__version__",
    },
    "__main__": {"cli"},
    "__init__": set(),  # what it offers is imported by lazy_loader, when it is asked for
}
ONLY_IN = {  # who may import these packages
    "lightning": {"tasks", "data", "cli"},
    "lazy_loader": {"__init__"},
    "triton": {"ssm", "layers"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "tensorboard": {"cli"},
    "soundfile": {"audio"},
    "soxr": {"audio"},
    "librosa": {"audio"},
    "torchaudio": {"audio"},
    "argparse": {"cli"},
    "huggingface_hub": {"hub"},
    "rich": {"tasks", "cli"},
    "PIL": {"data"},
    "litdata": {"data"},
    "torchvision": {"data"},
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "s4audio" else [node.module]
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way(path):
    part = path.parts[0].removesuffix(".py")
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "s4audio":
            assert rest.split(".")[0] in SEES[part] | {part}, f"{path} imports {name}"
        assert part in ONLY_IN.get(package, {part}), f"{path} imports {name}"


def test_every_package_with_a_rule_is_used_where_it_is_allowed():
    used = {name.partition(".")[0] for path in MODULES for name in imports(path)}
    assert set(ONLY_IN) - used <= {"triton"}


def test_ssm_needs_torch_only():
    for path in MODULES:
        if path.parts[0] == "ssm":
            outside = {name.partition(".")[0] for name in imports(path)} - {"s4audio", "torch", "triton"}
            assert outside <= set(sys.stdlib_module_names), path


def test_import_is_light():
    code = (
        "import resource, sys, torch; spent = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_utime; start = spent();"
        "import s4audio; s4audio.load, s4audio.Evaluator, s4audio.SaShiMi; print(spent() - start); print(*sys.modules)"
    )
    seconds, loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not {"lightning", "librosa", "matplotlib", "soundfile", "torchaudio", "rich"} & set(loaded.split())
    assert float(seconds) < 1.5


def test_help_waits_for_no_import():
    code = "import sys; from s4audio.cli import main; main(['--help']); main(['trian']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "did you mean train?" in done.stderr
