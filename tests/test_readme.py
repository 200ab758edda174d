"""What README.md, run.sh and the cluster files say is true of this checkout."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import cache_model
import download_example_dataset
import generate
import train
from dreambooth.run import export, plan
from tests.benchmarks import subjects

SCRIPTS = {
    "cache_model.py": cache_model,
    "download_example_dataset.py": download_example_dataset,
    "generate.py": generate,
    "train.py": train,
}
TEXTS = ["README.md", "run.sh"]
CLUSTER_FILES = ["dreambooth/machines/cluster.yaml", "dreambooth/machines/rayjob.yaml"]
FLAGS_OF_OTHERS = {  # pip, ray and TensorBoard
    "--help", "--quiet", "--disable-pip-version-check", "--logdir", "--address", "--generate",
    "--runtime-env-json",
}  # fmt: skip
NOT_HERE = {
    "tom.txt",
    "images/dog",
    "train_dreambooth.py",
}  # what step 2 downloads, and a script of diffusers
COLUMNS_ON_OTHERS = {"diffusers", "in place of", "the published example"}
FLAG = r"(?<![\w/-])--[a-z][\w-]*"


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


@pytest.fixture(scope="module")
def run_sh(root):
    return (root / "run.sh").read_text()


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


@pytest.fixture(params=[*TEXTS, *CLUSTER_FILES])
def text(request, root):
    """README.md, run.sh, where ${NAME:-default} is written as ${NAME: default}, and so on."""
    return without_columns_on_others((root / request.param).read_text()).replace(":-", ": ")


def flags_of(script):
    """The flags that a script's --help explains."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--\w[\w-]*", text.getvalue()))


def test_the_readmes_commands_are_accepted_by_the_scripts(readme, tmp_path):
    """As bash reads them, with the variables that its blocks set, and no others."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL))
    lines = re.findall(
        r"^(?:(?:[A-Z_]+=\S+ *)+(?:#.*)?|python .*)$", blocks.replace("\\\n", " "), re.MULTILINE
    )
    stand_in = f"""python() {{ printf '%q ' "$@" >> {tmp_path}/log; echo >> {tmp_path}/log; }}"""
    story = "\n".join(["set -eu", stand_in, *lines])
    bash = ["/usr/bin/env", "-i", "bash", "-c", story]
    done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {script for script, *_ in commands} == {*SCRIPTS, "-m"}
    parsers = {name: script.parse_args for name, script in SCRIPTS.items()}
    for script, *argv in commands:
        if script in parsers:
            parsers[script](argv)
        if argv[0] == "dreambooth.run.export":
            export.parse_args(argv[1:])


def test_the_core_is_as_short_as_the_readme_says(readme, root):
    files, limit = re.search(r"The core is (\w+) files, under ([\d,]+) lines", readme).groups()
    core = readme.partition("in reading order:\n\n```\n")[2].partition("```")[0]
    paths = re.findall(r"^\S+", core, re.MULTILINE)
    assert (files, len(paths)) == ("six", 6)
    lines = sum(len((root / path).read_text().splitlines()) for path in paths)
    assert lines < int(limit.replace(",", ""))


def test_each_flag_named_belongs_to_some_script(text, root):
    """Also in running text. The modules' own parsers (python -m dreambooth...) count, by their
    source."""
    known = set(FLAGS_OF_OTHERS)
    for script in SCRIPTS.values():
        known |= flags_of(script)
    for module in [*root.glob("dreambooth/**/*.py"), *root.glob("tests/benchmarks/*.py")]:
        known |= set(re.findall(r'\badd(?:_argument)?\(\s*"(--\w+)"', module.read_text()))
    found = set(re.findall(FLAG, text))
    assert found
    assert found - known == set()


def recipes(run_sh, name):
    """The defaults of one of run.sh's variables: for pocket and for Stable Diffusion 1.4."""
    found = re.findall(rf"^ *{name}=\$\{{{name}:-(.*?)\}}(?: |$)", run_sh, re.MULTILINE)
    assert len(found) >= 2, name
    (shared,) = re.findall(r'^ *local shared="(.*)"$', run_sh, re.MULTILINE)
    return [flags.replace("$shared", shared) for flags in found[:2]]


def test_recipes_of_the_readme_and_of_benchmarks_are_those_of_run_sh(readme, run_sh):
    """For one worker."""
    readme = " ".join(readme.replace("\\\n", " ").split())
    sizes = re.findall(r"PAIRS:-(\d+)\} STEPS=\${STEPS:-(\d+)\}", run_sh)[:2]
    of_all = []
    for name in ("TRAIN_FLAGS", "LORA_FLAGS"):
        for flags, (pairs, steps) in zip(recipes(run_sh, name), sizes, strict=True):
            numbers = f"--train_batch_size {pairs} --max_train_steps {steps}"
            assert numbers in readme
            assert all(flag in readme for flag in re.findall(r"--\w+ \S+", flags))
            of_all.append(f"{numbers} {flags}")
    full, _, lora, _ = of_all
    assert subjects.RECIPES["full"] == full
    assert subjects.RECIPES["lora"] == f"{lora} --use_lora"
    assert recipes(run_sh, "SAMPLE_FLAGS")[0] == f"--guidance_scale {subjects.GUIDANCE} --seed 1"
    for name in ("CLASS_FLAGS", "SAMPLE_FLAGS"):
        for flags in recipes(run_sh, name):
            assert flags in readme


def test_each_path_named_exists(text, root):
    """A path begins with a folder of the top level, or is a file's name with its suffix."""
    named = set(re.findall(r"(?<![\w./$}{-])(?:dreambooth|images|tests)/[\w./*-]*[\w*/]", text))
    named |= set(re.findall(r"(?<![\w./$}{-])(?:\./)?[\w-]+\.(?:py|sh|md|txt|toml|yaml)\b", text))
    assert named
    here = {file.name for file in [*root.glob("*.py"), *root.glob("tests/benchmarks/*")]}
    here |= {file.name for file in root.glob("dreambooth/**/*")}
    for path in {path.removeprefix("./") for path in named} - NOT_HERE:
        assert list(root.glob(path)) or path in here, path


def test_each_name_in_the_table_of_changes_is_in_the_code(readme, root):
    """That under "Make it yours": functions, variables and columns, in backticks."""
    table = readme.partition("## Make it yours")[2].partition("\n\nA checkpoint")[0]
    names = re.findall(r"`([a-z][a-z_]+)`", table)
    assert len(names) > 15
    files = [*root.glob("*.py"), *root.glob("dreambooth/**/*.py")]
    source = "\n".join(file.read_text() for file in files)
    assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_each_module_that_is_run_explains_itself(root, readme, run_sh, monkeypatch, capsys):
    """In README.md, run.sh and the modules' own docstrings."""
    files = [*root.glob("*.py"), *root.glob("dreambooth/**/*.py")]
    texts = [readme, run_sh, *(file.read_text() for file in files)]
    modules = set(re.findall(r"-m (dreambooth[\w.]*\w)", "\n".join(texts)))
    assert len(modules) > 5
    for module in modules - {"dreambooth.installed"}:  # which has no flags
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert not end.value.code, module
        assert "usage" in capsys.readouterr().out, module


def test_each_mark_of_the_readmes_table_stands_in_the_code(root, readme):
    """What makes it Ray Train's."""
    marks = re.findall(r"^\| (\[\d+\]) \|", readme, re.MULTILINE)
    files = ["train.py", "dreambooth/run/checkpoints.py", "dreambooth/machines/cluster.py"]
    code = "\n".join((root / file).read_text() for file in files)
    assert marks
    assert set(marks) == set(re.findall(r"# (\[\d+\])", code))


def test_training_and_sampling_have_the_same_prompt(root):
    """Fault 11 of the published example: trained as "photo of unqtkn dog", sampled as "photo of a
    unqtkn dog". Here no article stands before the identifier, in any text, script or help."""
    identifier = r"(?:unqtkn|\$\{?UNIQUE_TOKEN)"
    for name in [*TEXTS, *CLUSTER_FILES, *SCRIPTS]:
        text = without_columns_on_others((root / name).read_text())
        assert re.findall(rf"\b(?:an?|the) {identifier}", text) == [], name
        for beginning in re.findall(rf"[\"']([\w ]*?) ?{identifier}", text):
            assert beginning in ("photo of", ""), name
    for name in TEXTS:
        assert re.search(rf"photo of {identifier}", (root / name).read_text()), name


def test_each_fault_of_the_published_example_is_cited_by_a_test(root):
    table = (root / "tests" / "FAULTS.md").read_text()
    faults = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    assert faults == [str(number) for number in range(1, 13)]
    tests = " ".join(file.read_text() for file in root.glob("tests/test_*.py"))
    cited = re.findall(r"fault (\d+) of\s+the\s+published\s+example", tests, re.IGNORECASE)
    assert set(cited) == set(faults)


def pins(root):
    """The pinned versions of requirements.txt, by package."""
    text = (root / "requirements.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", text.lower(), re.MULTILINE))


def test_each_import_has_a_requirement(root):
    names = {"PIL": "pillow", "optimi": "torch-optimi"}
    own = {"dreambooth", *(script.removesuffix(".py") for script in SCRIPTS)}
    for file in [*root.glob("*.py"), *root.glob("dreambooth/**/*.py")]:
        for module in imported_modules(file) - own - set(sys.stdlib_module_names):
            assert names.get(module, module).lower() in pins(root), f"{file} imports {module}"


def imported_modules(file):
    """The top-level names of the modules that a file imports."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.append(node.module)
    return {module.partition(".")[0] for module in modules}


def test_rays_launcher_accepts_the_cluster_file(root):
    text = (root / CLUSTER_FILES[0]).read_text()
    config = yaml.safe_load(text)
    for source in config["file_mounts"].values():
        assert source.startswith("~") or (root / source).exists()
    config = prepare_config(config)
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    del config["available_node_types"]["gpu"]["resources"]
    with pytest.raises(Exception, match="resources"):
        validate_config(config)


def test_the_job_in_the_cluster_file_is_one_of_train_py(root, train_argv):
    text = (root / CLUSTER_FILES[0]).read_text()
    command = re.search(r"python train\.py (.*?) \.\.\.", text, re.DOTALL)[1]
    flags = re.sub(r"\\\n#", " ", command).split()
    args = train.parse_args([*train_argv("out"), *flags])
    plan.check_numbers(args)
    assert args.num_workers[1] == yaml.safe_load(text)["max_workers"]


def test_the_rayjob_runs_train_py_on_the_pinned_ray(root):
    job = yaml.safe_load((root / CLUSTER_FILES[1]).read_text())
    spec = job["spec"]
    python, script, *flags = shlex.split(spec["entrypoint"])
    assert python == "python"
    assert (root / script.rpartition("/")[2]).exists()
    args = train.parse_args(flags)
    plan.check_numbers(args)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == pins(root)["ray"]
    (workers,) = cluster["workerGroupSpecs"]
    assert args.num_workers == (workers["minReplicas"], workers["maxReplicas"])
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_ADDRESS"] == "auto"
