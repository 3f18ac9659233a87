"""The measures of the house: sizes, who imports whom, what the library leaves to scripts, what pages show."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
LIBRARY = sorted((ROOT / "snac48").rglob("*.py"))
OTHERS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "assets").rglob("*.py")])
FUNCTION_LINES, FILE_LINES = 60, {"train_dual_head.py": 700}

# {file:function: why it is better in one piece}, at most five
ALLOWED: dict[str, str] = {}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def imports(path: Path):
    """Top names of all imports of a file, those inside functions too; relative ones as "."."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.partition(".")[0]


def test_no_function_is_longer_than_a_screen():
    long = {f"{name(p)}:{f}": n for p in SCRIPTS + LIBRARY for f, n in functions(p) if n > FUNCTION_LINES}
    assert set(long) == set(ALLOWED), long  # an entry that is no longer needed goes, too
    assert len(ALLOWED) <= 5 and all(ALLOWED.values())


@pytest.mark.parametrize("path", SCRIPTS + LIBRARY, ids=name)
def test_no_file_is_longer_than_one_reads(path):
    assert path.read_text(encoding="utf-8").count("\n") <= FILE_LINES.get(name(path), 650)


def test_nothing_imports_a_script_and_the_library_parses_no_command_line():
    scripts = {p.stem for p in SCRIPTS}
    for path in SCRIPTS + LIBRARY + OTHERS:
        found = set(imports(path))
        assert not found & scripts, name(path)
        assert path not in LIBRARY or not found & {"argparse", "tests"}, name(path)


def test_the_library_prints_nothing_by_itself():
    """RunLog.say shows what a script says, cli.py tells errors on stderr; the rest is silent."""
    speaks = {name(p) for p in LIBRARY if re.search(r"\bprint\(", p.read_text(encoding="utf-8"))}
    assert speaks <= {"snac48/runlog.py", "snac48/cli.py"}


def test_a_decoder_opens_with_two_files():
    for file in ("codec.py", "decoder.py"):
        found = set(imports(ROOT / "snac48" / file)) - {"__future__", "."}
        foreign = found & {"pyarrow", "soundfile", "soxr", "scipy", "transformers", "tqdm", "textual"}
        assert not foreign, file


def test_readme_is_short_and_shows_only_what_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") < 200
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    programs = [*SCRIPTS, *LIBRARY, *OTHERS, ROOT / "tests" / "fuzz.py"]
    code = "\n".join(p.read_text(encoding="utf-8") for p in programs)
    known = set(re.findall(r"--[a-zA-Z][\w-]+", code + (ROOT / "launch.sh").read_text())) | {
        f"--{flag}"
        for flag in re.findall(r'^ +"(\w+)": \(', code, re.M)  # OPTIONS of train_dual_head.py
    }
    foreign = {"--nproc_per_node", "--exclude", "--revision"}  # of torchrun, rsync, hf
    foreign |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal"}
    foreign |= {"--requeue", "--open-mode", "--shutdown-timeout"}  # of Slurm, torchrun
    for page in pages:
        text = page.read_text(encoding="utf-8")
        flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", text)) - foreign
        missing = {f for f in flags if f not in known and f.replace("--no-", "--") not in known}
        assert not missing, (page.name, missing)
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), (page.name, link)
