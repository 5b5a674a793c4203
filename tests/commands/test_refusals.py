"""What is wrong with a job is said within seconds, before a cluster starts and a model is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mistakes import refused

from batchrun.driver.prepare import prepare
from batchrun.errors import JobError, ModelError
from batchrun.output import identity
from batchrun.output.output import open_folder
from jobs import environment, load, write_job

LOSSY = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder / "model")
    return folder / "model"


def test_weights_that_were_cut_short_are_refused(tmp_path, tiny_llama):
    model = copied(tiny_llama, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors: weights are cut short.*bytes are there; copy"):
        prepare(load(write_job(tmp_path, model)))
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        prepare(load(write_job(tmp_path, model)))
    weights.write_bytes(b"")
    with pytest.raises(ModelError, match="cut short"):
        prepare(load(write_job(tmp_path, model)))


def test_a_file_of_weights_that_is_missing_is_refused_by_the_index(tmp_path, tiny_llama):
    model = copied(tiny_llama, tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="1 of 2 files of weights are missing, the first is model-00001"):
        prepare(load(write_job(tmp_path, model)))


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("BertModel", "bert"),
        ("LlamaForSequenceClassification", "llama"),
        ("ViTForImageClassification", "vit"),
    ],
)
def test_a_model_that_generates_no_text_is_refused(architecture, model_type, tmp_path, tiny_llama):
    model = copied(tiny_llama, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "architectures": [architecture], "model_type": model_type})
    )
    with pytest.raises(ModelError, match=f"{architecture} does not generate text"):
        prepare(load(write_job(tmp_path, model)))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nowhere:Engine", "no module 'nowhere'"),
        ("engines:EchoEngin", "no class 'EchoEngin'.*did you mean 'EchoEngine'"),
        ("faulty:FaultyStore", "has no load and no generate"),
    ],
)
def test_an_engine_that_is_not_there_is_refused(kind, says, tmp_path, tiny_llama):
    with pytest.raises(JobError, match=says):
        prepare(load(write_job(tmp_path, tiny_llama, engine={"kind": kind})))


def test_a_plan_into_an_output_that_a_run_would_not_touch_is_refused_like_the_run(tmp_path, tiny_llama):
    folder = tmp_path / "job"
    folder.mkdir()
    job = write_job(folder, tiny_llama)
    identity.pin(open_folder(load(job)), prepare(load(job)).identity)
    changed = ("plan", job, "--set", "generation.max_new_tokens=8")
    said = refused(*changed, where="max_new_tokens: 64 -> 8", fix="use another output.path")
    assert "it holds answers of another job" in said
    for output in ("out", "notes"):
        mine = folder / output / "data/mine.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        refused("plan", job, "--set", f"output.path={output}", where="data/mine.txt", fix="an empty folder")


def test_a_file_in_the_outputs_place_is_refused(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, output={"path": "answers"})
    (tmp_path / "answers").write_text("mine")
    for command in ("plan", "run"):
        refused(command, job, where=f"{tmp_path}/answers: there is a file", fix="another output.path")


def test_a_role_that_the_chat_template_leaves_out_is_refused(tmp_path, tiny_llama):
    prompt = {
        "template": None,
        "chat_template": LOSSY,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ text }}"}],
    }
    job = write_job(tmp_path, tiny_llama, prompt=prompt)
    with pytest.raises(ModelError, match="leaves out messages of the role 'system'"):
        prepare(load(job))


def test_making_prompts_imports_no_torch_in_the_commands_own_process(tmp_path, tiny_llama):
    program = (
        "import sys\n"
        f"sys.argv = ['batchrun', 'plan', {str(write_job(tmp_path, tiny_llama))!r}]\n"
        "import atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from batchrun.__main__ import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "False"), ran.stderr
    assert ran.stderr == ""
