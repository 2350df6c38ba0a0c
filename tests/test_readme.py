"""What the README and the docstrings show runs."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = [path for path in (ROOT / "s4audio").rglob("*.py") if ">>> " in path.read_text()]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_block_of_the_readme_runs(block):
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})


def test_recipes_and_scripts_that_the_readme_names_exist():
    named = set(re.findall(r"(?:recipes|evaluation|tests|s4audio)/[\w/]+\.\w+", README))
    assert named and all((ROOT / name).is_file() for name in named), named


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_doctests(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
