"""What README.md and run.sh say is true of this checkout, and the code keeps to its own rules."""

import argparse
import ast
import re
import subprocess
import sys

import pytest

import cache_model
import download_example_dataset
import generate
import train

SCRIPTS = {"cache_model.py": cache_model, "download_example_dataset.py": download_example_dataset,
           "generate.py": generate, "train.py": train}  # fmt: skip
TOP_LEVEL = {
    "README.md", "requirements.txt", "cache_model.py", "download_example_dataset.py", "generate.py", "train.py",
    "dreambooth", "images", "tests", "run.sh", "LICENSE", "pyproject.toml",
}  # fmt: skip
OTHERS_FLAGS = {"--help", "--quiet", "--disable-pip-version-check", "--check", "--head", "--address"}  # pip, ruff, ray
TEXTS = ["README.md", "run.sh"]


@pytest.fixture(scope="module")
def tracked(root):
    """The files of the repository, those not yet committed included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()


def options(script, monkeypatch):
    """The --flags of a script's parser."""
    found = set()

    def keep(parser, argv=None):
        found.update(parser._option_string_actions)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        SCRIPTS[script].parse_args([])
    return found


def commands(text):
    """Each command of a text that runs one of the scripts, continued lines joined, with its flags."""
    for line in text.replace("\\\n", " ").splitlines():
        for script in SCRIPTS:
            _, found, words = line.partition(f"{script} ")
            if found:
                words = re.split(r"\s[|;#]\s|`|&&", words)[0]
                yield script, re.findall(r"(?<![\w-])--[a-z][\w-]*", words)


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_commands_are_those_of_the_script(root, name, monkeypatch):
    found = list(commands((root / name).read_text()))
    assert {script for script, _ in found} >= {"train.py", "generate.py", "cache_model.py"}
    wrong = [(script, flag) for script, flags in found for flag in flags if flag not in options(script, monkeypatch)]
    assert wrong == []


@pytest.mark.parametrize("name", TEXTS)
def test_each_flag_named_belongs_to_some_script(root, name, monkeypatch):
    """Also those in running text. The modules' own parsers (python -m dreambooth...) count, by their source."""
    known = set().union(*(options(script, monkeypatch) for script in SCRIPTS)) | OTHERS_FLAGS
    for module in [*root.glob("dreambooth/**/*.py"), *root.glob("tests/benchmarks/**/*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', module.read_text()))
    named = set(re.findall(r"(?<![\w/-])--[a-z][\w-]*", (root / name).read_text()))
    assert named - known == set()


@pytest.mark.parametrize("name", TEXTS)
def test_each_path_named_exists(root, tracked, name):
    """A path is a word that begins with a name of the top level and goes on, or is a script's name.
    images/dog is what step 2 downloads; the pocket model's weights come with the checkout."""
    text = (root / name).read_text()
    words = set(re.findall(r"(?<![\w./$}{-])(?:\./)?(?:dreambooth|images|tests)/[\w./*-]*[\w*/]", text))
    words |= set(re.findall(r"(?<![\w./$}{-])(?:\./)?[\w-]+\.(?:py|sh|md|txt|toml)\b", text))
    words = {word.removeprefix("./") for word in words} - {"images/dog"}
    assert words
    bare = {path.rpartition("/")[2] for path in tracked}
    missing = [w for w in words if not list(root.glob(w)) and w not in bare]
    assert missing == []


@pytest.mark.parametrize("name", TEXTS)
def test_modules_that_are_run_exist(root, name):
    for module in re.findall(r"python -m (dreambooth[\w.]*)", (root / name).read_text()):
        assert (root / f"{module.replace('.', '/')}.py").exists(), module


def test_same_words_in_training_and_in_sampling(root):
    """Fault 11 of the original: trained as "photo of unqtkn dog", sampled as "photo of a unqtkn dog".
    Here no article stands before the identifier, in any text, script or help."""
    for file in [root / name for name in TEXTS] + [root / name for name in SCRIPTS]:
        text = file.read_text()
        identifier = r"(?:unqtkn|\$\{?UNIQUE_TOKEN)"
        assert re.findall(rf"\b(?:an?|the) {identifier}", text) == [], file.name
        for start in re.findall(rf"[\"']([\w ]*?) ?{identifier}", text):
            assert start in ("photo of", ""), file.name
    for name in TEXTS:
        assert re.search(r"photo of (?:unqtkn|\$\{?UNIQUE_TOKEN)", (root / name).read_text()), name


def test_own_photos_are_renewed_for_each_subject(root):
    """Fault 11 of the original: the last subject's photos stayed in the folder of own images. run.sh
    fills it with `python -m dreambooth.images`, which test_images.py holds to that, and removes nothing."""
    text = (root / "run.sh").read_text()
    assert re.search(r'-m dreambooth\.images "?\$INSTANCE_DIR"? "?\$IMAGES_OWN_DIR"?', text)
    assert not re.search(r"\brm\b", text)


def test_run_sh_is_strict_and_sound_to_bash(root):
    text = (root / "run.sh").read_text()
    assert "set -euo pipefail" in text
    assert subprocess.run(["bash", "-n", root / "run.sh"], capture_output=True).returncode == 0
    assert (root / "run.sh").stat().st_mode & 0o111
    for variable in (
        "DATA_PREFIX", "ORIG_MODEL_NAME", "ORIG_MODEL_HASH", "ORIG_MODEL_DIR", "ORIG_MODEL_PATH", "TUNED_MODEL_DIR",
        "IMAGES_REG_DIR", "IMAGES_OWN_DIR", "IMAGES_NEW_DIR", "NUM_WORKERS", "UNIQUE_TOKEN", "CLASS_NAME",
        "INSTANCE_DIR",
    ):  # fmt: skip
        assert re.search(rf"\$\{{{variable}:[-=]|: \"\$\{{{variable}:=", text), f"{variable} cannot be set from outside"


def test_top_level_is_that_of_the_design(tracked):
    names = {path.partition("/")[0] for path in tracked}
    assert {name for name in names if not name.startswith(".")} - TOP_LEVEL == set()
    assert TOP_LEVEL - {"LICENSE", "pyproject.toml"} <= names


def test_no_function_is_longer_than_sixty_lines(root, tracked):
    long = []
    for path in tracked:
        if path.endswith(".py"):
            for node in ast.walk(ast.parse((root / path).read_text())):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60:
                    long.append(f"{path}: {node.name}, {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_each_requirement_is_pinned(root):
    lines = [line.partition("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert len(lines) >= 10
    for line in lines:
        assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.+]+", line), line
    assert "torch==2.15.0" in lines
    assert "ray[train,data]==2.60.0" in lines


def test_what_is_imported_is_required(root, tracked):
    """Each foreign module that the code imports has its line in requirements.txt."""
    required = {re.split(r"[\[=]", line)[0].lower() for line in (root / "requirements.txt").read_text().splitlines()}
    own = {"dreambooth", "tests", *(script.removesuffix(".py") for script in SCRIPTS)}
    names = {"PIL": "pillow", "optimi": "torch-optimi"}
    for path in tracked:
        if path.endswith(".py") and not path.startswith("tests/benchmarks"):
            for node in ast.walk(ast.parse((root / path).read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module]
                for module in {m.partition(".")[0] for m in modules} - own - set(sys.stdlib_module_names):
                    assert names.get(module, module).lower() in required, f"{path} imports {module}"
