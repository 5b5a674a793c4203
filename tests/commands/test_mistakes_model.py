"""What users get wrong about the model, the engine and the cluster: one line with what, where and the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mistakes import job_of, mistakes, refused
from tiny_models import model_folder


def config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def without(*names: str) -> Any:
    def change(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return change


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_weights(data: bytes) -> Any:
    return lambda model: (model / "model.safetensors").write_bytes(data)


def lost_shard(model: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(model: Path) -> None:
    config(model, auto_map={"AutoModelForCausalLM": "modeling.Model"})


def text_of(name: str, text: str) -> Any:
    return lambda model: (model / name).write_text(text)


def no_chat_template(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    (model / "chat_template.jinja").unlink(missing_ok=True)


NO_TOKENIZER = without("tokenizer.json", "tokenizer_config.json")
CHAT = {"template": None, "messages": [{"role": "user", "content": "{{ text }}"}]}

# What is changed in the folder of a right model.
MODELS = (
    ("no config", without("config.json"), "no config.json", "transformers' layout"),
    ("a config that is no JSON", text_of("config.json", "{"), "config.json", "restore the file"),
    ("a config of a list", text_of("config.json", "[]"), "config.json", "restore"),
    ("an empty config", text_of("config.json", "{}"), "config", "check config.json"),
    ("an unknown model type", lambda m: config(m, model_type="llama9"), "llama9", "transformers' version"),
    ("no weights", without("model.safetensors"), "no *.safetensors weights", "copy the whole model"),
    ("pickled weights", pickled, "pytorch_model.bin", "convert them to safetensors"),
    ("truncated weights", cut_short, "model.safetensors", "copy the file again"),
    ("empty weights", of_weights(b""), "model.safetensors", "copy the file again"),
    ("an HTML page for weights", of_weights(b"<html>" * 99), "model.safetensors", "copy the file again"),
    ("a Git LFS pointer", of_weights(b"version https://git-lfs"), "model.safetensors", "git lfs pull"),
    ("a shard that is missing", lost_shard, "model-00001-of-00002", "copy the whole model"),
    (
        "an encoder",
        lambda m: config(m, architectures=["BertModel"], model_type="bert"),
        "BertModel",
        "CausalLM",
    ),
    (
        "a classifier",
        lambda m: config(m, architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification does not generate text",
        "use a model that does",
    ),
    ("code of its own", own_code, "auto_map", "model.trust_remote_code: true"),
    ("no tokenizer", NO_TOKENIZER, "no tokenizer", "add its tokenizer.json"),
    ("a damaged tokenizer", text_of("tokenizer.json", "{"), "tokenizer", "set model.tokenizer"),
)


def of_model(**keys: Any) -> Any:
    return lambda folder: {"model": keys}


def empty_folder(folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return {"model": {"name": "empty"}}


def file_of_weights(folder: Path) -> dict[str, Any]:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return {"model": {"name": str(folder / "model.gguf")}}


# What is changed in a job with a right model.
REFERENCES = (
    (
        "a folder that is not there",
        of_model(name="/no/such/model"),
        "/no/such/model",
        "give a model's folder",
    ),
    ("a relative folder", of_model(name="./models/none"), "models/none", "give a model's folder"),
    ("an empty folder", empty_folder, "no config.json", "transformers' layout"),
    ("a file of weights", file_of_weights, "model.gguf", "give a model's folder"),
    ("a name with spaces", of_model(name="my great model"), "my great model", "hub id"),
    ("an unknown protocol", of_model(name="hff://org/name"), "hff://org/name", "did you mean 'hf'?"),
    (
        "a tokenizer that is not there",
        of_model(tokenizer="/no/tokenizer"),
        "/no/tokenizer",
        "give a tokenizer's",
    ),
)

ENGINES = (
    ("a module that is not there", "nowhere:Engine", "no module 'nowhere'", "PYTHONPATH"),
    ("a package's module that is not there", "json.nowhere:Engine", "no module 'json.nowhere'", "PYTHONPATH"),
    (
        "a misspelt class",
        "engines:EchoEngin",
        "engine.kind: no class 'EchoEngin'",
        "did you mean 'EchoEngine'?",
    ),
    ("a class without methods", "faulty:FaultyStore", "has no load and no generate", "protocol.py"),
    ("a colon alone", "engines:", "engine.kind", "module:Class"),
    ("a path of a file", "./engines.py:EchoEngine", "engine.kind", "module:Class"),
)

PEM = {"ca": "ca.pem", "cert": "cert.pem", "key": "key.pem"}
CLUSTERS = (
    ("an unknown protocol", {"address": "http://head:8786"}, "cluster.address", "tcp://"),
    ("no protocol and no port", {"address": "head"}, "cluster.address", "tcp://"),
    ("missing TLS files", {"address": "tls://head:8786", "tls": PEM}, "cluster.tls", "give PEM files"),
    ("Slurm without sbatch", {"slurm": {}}, "cluster.slurm", "on a machine that submits jobs"),
    ("Kubernetes without an image", {"kubernetes": {"name": "x"}}, "cluster.kubernetes", "it takes image"),
    ("an unknown key", {"kubernetes": {"image": "x", "gpus": 1}}, "unknown gpus", "it takes image"),
)


@mistakes(*MODELS)
def test_a_wrong_model_is_refused_in_one_line(mistake, tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "model")
    mistake.make(tmp_path / "model")
    refused("plan", job_of(tmp_path, model={"name": "model"}), where=mistake.where, fix=mistake.fix)


@mistakes(*REFERENCES)
def test_a_wrong_reference_to_a_model_is_refused_in_one_line(mistake, tmp_path, tiny_llama):
    changed = {"name": str(tiny_llama), **mistake.make(tmp_path)["model"]}
    refused("run", job_of(tmp_path, model=changed), where=mistake.where, fix=mistake.fix)


@pytest.mark.parametrize(("name", "what"), [("gpt2", "no linear layers"), ("t5", "only causal")])
def test_fp8_that_would_convert_nothing_is_refused_in_one_line(name, what, tmp_path):
    model = {"name": str(model_folder(name)), "quantization": "fp8"}
    said = refused("plan", job_of(tmp_path, model=model), where="model.quantization", fix="leave the key out")
    assert what in said


def test_messages_without_a_chat_template_are_refused_in_one_line(tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "model")
    no_chat_template(tmp_path / "model")
    job = job_of(tmp_path, model={"name": "model"}, prompt=CHAT)
    refused("plan", job, where="no chat template", fix="set prompt.chat_template")


@mistakes(*ENGINES)
def test_a_wrong_engine_is_refused_in_one_line(mistake, tmp_path, tiny_llama):
    job = job_of(tmp_path, model={"name": str(tiny_llama)}, engine={"kind": mistake.make})
    refused("run", job, where=mistake.where, fix=mistake.fix)


@mistakes(*CLUSTERS)
def test_a_wrong_cluster_is_refused_in_one_line(mistake, tmp_path, tiny_llama):
    job = job_of(tmp_path, model={"name": str(tiny_llama)}, cluster=mistake.make)
    refused("run", job, where=mistake.where, fix=mistake.fix)
