"""Guards of the house itself: packaging, names and the README's map.

Oracle: the disk. Each guard was seen to fail on the fault it is for.
"""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"kernels": "oxillama_torch.kernels", "server": "oxillama_torch.server"}


def _packages_on_disk():
    found = set()
    for top in ("oxillama_torch", *MAPPED):
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]:
            if folder.is_dir() and any(folder.glob("*.py")):
                name = ".".join(folder.relative_to(ROOT).parts)
                found.add(name if top == "oxillama_torch" else f"oxillama_torch.{name}")
    return found


def test_setup_cfg_lists_every_package():
    """A forgotten package works in the checkout and is missing from the wheel."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(setup["options"]["packages"].split()) == _packages_on_disk()


@pytest.mark.parametrize("folder", ["kernels", "server"])
def test_mapped_folders_are_no_regular_packages(folder):
    """With an __init__.py the folder would hide other top-level packages of that name."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "oxillama_torch" / folder).exists()


def test_no_init_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_imports_the_short_names():
    short = re.compile(r"^\s*(?:from|import)\s+(?:kernels|server)\b", re.MULTILINE)
    for folder in ("oxillama_torch", "kernels", "server", "tests", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not short.search(path.read_text(encoding="utf-8")), path


def test_transformers_and_peft_live_beside_us():
    """Run from the checkout, where the folder ``kernels`` is on sys.path."""
    code = (
        "import oxillama_torch.kernels.registry, sys\n"
        "from transformers import LlamaForCausalLM\n"
        "import peft\n"
        f"bad = [n for n, m in sys.modules.items() if n.split('.')[0] in {set(MAPPED)!r}\n"
        "       and getattr(m, '__file__', None)]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=240)


def test_importing_the_package_is_light():
    """The template worker and ``--help`` depend on it."""
    code = "import oxillama_torch, sys; assert not {'torch', 'flask'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_readme_map_names_real_files():
    """Every path in the README's file map exists, and every top-level folder is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## File map", 1)[1].split("```")[1]
    paths = [line.split()[0] for line in block.splitlines() if line.strip()]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    for folder in ("oxillama_torch", "kernels", "server"):
        for sub in (ROOT / folder).iterdir():
            if sub.is_dir() and any(sub.glob("*.py")):
                assert f"{folder}/{sub.name}/" in paths, f"{folder}/{sub.name}/ is not in the map"
