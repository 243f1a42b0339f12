"""The promises of the repository: what lies where, how long a function may be, and a README whose commands exist."""
import ast
import importlib
import re
import shlex
import subprocess
import sys

import count_lines
import pytest
from conftest import ROOT

TOP = {"01_pseudolabel.py", "02_bev_gt.py", "03_pretrain.py", "04_finetune.py", "05_eval.py", "model.py",
       "reproject.py", "requirements.txt", "README.md", "LICENSE", "tests"}
SCRIPTS = sorted(ROOT.glob("*.py"))
ALLOWED = {"torch", "torchvision", "nuscenes", "transformers", "numpy", "tqdm", "PIL",  # the seven packages
           "shapely", "pyquaternion", "matplotlib", "safetensors"}  # come with nuscenes-devkit and transformers
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def tracked():
    """Paths that git tracks, relative to the root."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def test_top_level_is_exactly_the_design():
    assert {path.split("/")[0] for path in tracked() if not path.startswith(".")} == TOP


@pytest.mark.parametrize("path", SCRIPTS + sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.name)
def test_functions_are_short_and_lines_fit(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_public_names_have_docstrings_and_imports_are_the_allowed(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name
    names = {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names -= set(sys.stdlib_module_names) | {"model", "reproject"}
    assert names <= ALLOWED
    if path.name[:2] not in ("01", "02"):
        assert "nuscenes" not in names
    if path.name[:2] != "01":
        assert "transformers" not in names


def test_seven_packages_are_installed_and_pytest():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == {"torch", "torchvision", "nuscenes-devkit", "transformers",
                                                       "numpy", "tqdm", "pillow", "pytest"}
    assert all("==" in line for line in lines)  # what was tested, and nothing else


def test_the_scripts_do_not_grow():
    """All of it is to be read in one sitting: what comes in, something must make room for."""
    assert sum(len(path.read_text().splitlines()) for path in SCRIPTS) <= 2697


def test_lines_are_counted():
    text = ('"""What it is."""\nimport os  # why\n\n\n'
            'def f(x):\n    """Says\n    more."""\n    # a comment\n    return """one\ntwo"""\n')
    assert count_lines.count(text) == {"lines": 10, "code": 4, "comments": 2, "docstrings": 3, "longest": 6}
    assert f"| {' | '.join(f'{n:,}' for n in (len(SCRIPTS), *count_lines.total(SCRIPTS).values()))} |" in README


def test_no_path_of_a_machine():
    for path in tracked():
        if path.endswith((".py", ".md", ".txt", ".json", "run")) and "test_house" not in path:
            assert not re.search(r"(?<![\w.~<}])/(home|root|work|mnt|data|tmp|Users)/", (ROOT / path).read_text()), path


def test_readme_names_the_tested_commands():
    assert COMMANDS[0] == ("pip install -r requirements.txt && python tests/toyworld.py && "
                           "for stage in 0*.py; do python $stage || break; done")
    assert COMMANDS[1] == "python -m pytest -q tests"


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(torchrun .*|python )(0|tests/(toy|bench))", c)])
def test_readme_commands_are_accepted(command, monkeypatch):
    """Every flag that the README shows exists and takes the value shown."""
    words = shlex.split(re.sub(r"^torchrun --nproc-per-node \d+", "python", command), comments=True)[1:]
    assert (ROOT / words[0]).exists()
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(ROOT / "tests")
    module = importlib.import_module(words[0].removeprefix("tests/").removesuffix(".py"))
    module.parse_args()
