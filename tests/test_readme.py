"""What README.md and run.sh say is true of this checkout."""

import argparse
import ast
import math
import re
import shlex
import subprocess
import sys

import pytest
from huggingface_hub import metadata_load
from ray.autoscaler._private.util import prepare_config, validate_config

import cache_model
import download_example_dataset
import generate
import train

SCRIPTS = {
    "cache_model.py": cache_model,
    "download_example_dataset.py": download_example_dataset,
    "generate.py": generate,
    "train.py": train,
}
TEXTS = ["README.md", "run.sh"]
FLAGS_OF_OTHERS = {  # pip, ruff, ray and TensorBoard
    "--help", "--quiet", "--disable-pip-version-check", "--check", "--logdir", "--address",
    "--generate",
    "--runtime-env-json",
}  # fmt: skip
# What step 2 downloads, a file of the user's, and a script of diffusers.
NOT_HERE = {"images/dog", "prompts.txt", "train_dreambooth.py"}
COLUMNS_ON_OTHERS = {"diffusers", "in place of", "the published example"}
FLAG = r"(?<![\w/-])--[a-z][\w-]*"


def without_columns_on_others(text):
    """A text without those columns of its tables that are about other code than this."""
    lines = []
    header = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            lines.append(line)
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        header = header or cells
        named = zip(header, cells, strict=False)
        lines.append(" | ".join(cell for name, cell in named if name not in COLUMNS_ON_OTHERS))
    return "\n".join(lines)


@pytest.fixture(params=TEXTS)
def text(request, root):
    """README.md and run.sh, where ${NAME:-default} is written as ${NAME: default}."""
    return without_columns_on_others((root / request.param).read_text()).replace(":-", ": ")


@pytest.fixture(scope="module")
def run_sh(root):
    return (root / "run.sh").read_text()


@pytest.fixture(scope="module")
def python_files(root):
    """The project's own code, but for what only benchmarks need."""
    files = [*root.glob("*.py"), *root.glob("dreambooth/**/*.py"), *root.glob("tests/*.py")]
    assert len(files) > 30
    return files


def flags_of(script):
    """The flags of a script's parser."""
    parsers = []

    def keep(parser, argv=None):
        parsers.append(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        script.parse_args([])
    return set(parsers[0]._option_string_actions)


def commands(text):
    """Each command of a text that runs one of the scripts, with its flags."""
    for line in text.replace("\\\n", " ").splitlines():
        for script in SCRIPTS:
            _, found, rest = line.partition(f"{script} ")
            if found:
                command = re.split(r"\s[|;#]\s|`|&&", rest)[0]
                yield script, re.findall(FLAG, command)


def test_flags_in_commands_are_those_of_the_script(text):
    found = list(commands(text))
    assert {script for script, _ in found} >= {"train.py", "generate.py", "cache_model.py"}
    for script, flags in found:
        assert set(flags) <= flags_of(SCRIPTS[script]), script


def test_each_flag_named_belongs_to_some_script(text, root):
    """Also in running text. The modules' own parsers (python -m dreambooth...) count, by their
    source."""
    known = set(FLAGS_OF_OTHERS)
    for script in SCRIPTS.values():
        known |= flags_of(script)
    for module in [*root.glob("dreambooth/**/*.py"), *root.glob("tests/benchmarks/*.py")]:
        known |= set(re.findall(r'\badd(?:_argument)?\(\s*"(--\w+)"', module.read_text()))
    assert set(re.findall(FLAG, text)) - known == set()


def recipes(run_sh, name):
    """The defaults of one of run.sh's variables: one for pocket, one for Stable Diffusion."""
    found = re.findall(rf"^ *{name}=\$\{{{name}:-(.*?)\}}(?: |$)", run_sh, re.MULTILINE)
    assert len(found) == 2, name
    return found


def test_recipes_of_run_sh_are_accepted_by_the_scripts(run_sh, train_argv, generate_argv):
    for name in ("TRAIN_FLAGS", "LORA_FLAGS"):
        for flags in recipes(run_sh, name):
            args = train.parse_args(train_argv("out") + shlex.split(flags))
            assert args.lr == float(re.search(r"--lr (\S+)", flags)[1])
    for name in ("CLASS_FLAGS", "SAMPLE_FLAGS"):
        for flags in recipes(run_sh, name):
            args = generate.parse_args(generate_argv("out") + shlex.split(flags))
            given = re.search(r"--guidance_scale (\S+)", flags)
            assert args.guidance_scale == (float(given[1]) if given else 7.5)


def test_recipes_of_the_readme_are_those_of_run_sh(root, run_sh):
    """For one worker, with 200 class images."""
    readme = (root / "README.md").read_text().replace("\\\n", " ")
    readme = " ".join(readme.split())
    sizes = [
        tuple(map(int, found))
        for found in re.findall(r"PAIRS:-(\d+)\} STEPS=\${STEPS:-(\d+)\}", run_sh)
    ]
    for name in ("TRAIN_FLAGS", "LORA_FLAGS"):
        for flags, (pairs, steps) in zip(recipes(run_sh, name), sizes, strict=True):
            epochs = math.ceil(pairs * steps / 200)
            numbers = f"--train_batch_size {pairs} --num_epochs {epochs} --max_train_steps {steps}"
            assert f"{numbers} {flags}" in readme
    for name in ("CLASS_FLAGS", "SAMPLE_FLAGS"):
        for flags in recipes(run_sh, name):
            assert flags in readme


def test_each_path_named_exists(text, root, python_files):
    """A path begins with a folder of the top level, or is a file's name with its suffix."""
    named = set(re.findall(r"(?<![\w./$}{-])(?:dreambooth|images|tests)/[\w./*-]*[\w*/]", text))
    named |= set(re.findall(r"(?<![\w./$}{-])(?:\./)?[\w-]+\.(?:py|sh|md|txt|toml)\b", text))
    assert named
    modules = {file.name for file in [*python_files, *root.glob("tests/benchmarks/*")]}
    for path in {path.removeprefix("./") for path in named} - NOT_HERE:
        assert list(root.glob(path)) or path in modules, path


def test_each_module_that_is_run_exists(text, root):
    found = re.findall(r"-m (dreambooth[\w.]*)", text)
    assert found
    for module in found:
        assert (root / f"{module.replace('.', '/')}.py").exists(), module


def test_each_module_is_on_the_readmes_map(root):
    readme = (root / "README.md").read_text()
    for file in root.glob("dreambooth/*.py"):
        assert file.name == "__init__.py" or f"dreambooth/{file.name}" in readme, file.name


def test_each_variable_in_the_readmes_commands_is_set_there(root):
    blocks = re.findall(r"```bash\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    commands = "\n".join(blocks)
    used = set(re.findall(r"\$\{?([A-Z_]+)", commands))
    is_set = set(re.findall(r"\b([A-Z_]+)=", commands))
    assert used <= is_set


def test_each_mark_of_the_readmes_table_stands_in_train(root):
    """What makes it Ray Train's."""
    readme = (root / "README.md").read_text()
    marks = re.findall(r"^\| (\[\d\]) \|", readme, re.MULTILINE)
    assert marks == [f"[{i}]" for i in range(1, len(marks) + 1)]
    script = (root / "train.py").read_text()
    assert set(marks) == set(re.findall(r"# (\[\d\])", script))


def test_training_and_sampling_have_the_same_prompt(root):
    """Fault 11 of the published example: trained as "photo of unqtkn dog", sampled as "photo of a
    unqtkn dog". Here no article stands before the identifier, in any text, script or help."""
    identifier = r"(?:unqtkn|\$\{?UNIQUE_TOKEN)"
    for name in [*TEXTS, *SCRIPTS]:
        text = without_columns_on_others((root / name).read_text())
        assert re.findall(rf"\b(?:an?|the) {identifier}", text) == [], name
        for beginning in re.findall(rf"[\"']([\w ]*?) ?{identifier}", text):
            assert beginning in ("photo of", ""), name
    for name in TEXTS:
        assert re.search(rf"photo of {identifier}", (root / name).read_text()), name


def test_each_fault_of_the_readmes_table_is_cited_by_a_test(root):
    readme = (root / "README.md").read_text()
    faults = re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)
    assert faults == [str(number) for number in range(1, 13)]
    tests = " ".join(file.read_text() for file in root.glob("tests/test_*.py"))
    cited = re.findall(r"fault (\d+) of\s+the\s+published\s+example", tests, re.IGNORECASE)
    assert set(cited) == set(faults)


def test_own_photos_are_renewed_for_each_subject(run_sh):
    """Fault 11 of the published example: the last subject's photos stayed in the folder of own
    images. run.sh fills it with dreambooth.images, whose tests are in test_images.py."""
    assert re.search(r'-m dreambooth\.images "\$INSTANCE_DIR" "\$IMAGES_OWN_DIR"', run_sh)


def test_bash_can_read_and_run_run_sh(root, run_sh):
    assert "set -euo pipefail" in run_sh
    checked = subprocess.run(["bash", "-n", root / "run.sh"], capture_output=True)
    assert checked.returncode == 0
    assert (root / "run.sh").stat().st_mode & 0o111


def test_run_sh_explains_itself(root):
    done = subprocess.run([root / "run.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "./run.sh test" in done.stdout
    refused = subprocess.run([root / "run.sh", "tset"], capture_output=True, text=True)
    assert refused.returncode == 2


VARIABLES = [
    "DATA_PREFIX",
    "ORIG_MODEL_NAME",
    "ORIG_MODEL_HASH",
    "ORIG_MODEL_DIR",
    "ORIG_MODEL_PATH",
    "TUNED_MODEL_DIR",
    "IMAGES_REG_DIR",
    "IMAGES_OWN_DIR",
    "IMAGES_NEW_DIR",
    "INSTANCE_DIR",
    "NUM_WORKERS",
    "PAIRS",
    "STEPS",
    "UNIQUE_TOKEN",
    "CLASS_NAME",
    "CLASS_PROMPT",
]


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_can_be_set_from_outside(run_sh, name):
    assert re.search(rf"\b{name}=\$\{{{name}:-", run_sh)


def read_requirements(root):
    lines = (root / "requirements.txt").read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return [line for line in lines if line]


def test_rays_launcher_accepts_the_cluster_file(root, tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "cluster.md").write_text(f"---\n{text}---\n")  # as the Hub's library reads YAML
    config = metadata_load(tmp_path / "cluster.md")
    validate_config(prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]
    del config["available_node_types"]["gpu"]["resources"]
    with pytest.raises(Exception, match="resources"):
        validate_config(prepare_config(config))


def test_each_requirement_is_pinned(root):
    requirements = read_requirements(root)
    assert requirements
    for line in requirements:
        assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.+]+", line), line


def imported_modules(file):
    """The top-level names of the modules that a file imports."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.append(node.module)
    return {module.partition(".")[0] for module in modules}


def test_each_import_has_a_requirement(root, python_files):
    required = {re.split(r"[\[=]", line)[0].lower() for line in read_requirements(root)}
    names = {"PIL": "pillow", "optimi": "torch-optimi"}
    own = {"dreambooth", "tests", *(script.removesuffix(".py") for script in SCRIPTS)}
    for file in python_files:
        for module in imported_modules(file) - own - set(sys.stdlib_module_names):
            assert names.get(module, module).lower() in required, f"{file} imports {module}"
