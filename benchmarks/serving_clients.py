"""Clients of others against strop serve: python -m benchmarks.serving_clients --python PATH [--model FOLDER]

lm_eval   local-completions over HTTP and its own hf model in process: loglikelihoods of two small tasks, both float32
llm       a chat and a completion through extra-openai-models.yaml, streamed and whole, beside the server's own answers

PATH is the Python of an environment with both, apart from this one since they need some sixty packages:
python -m venv clients && clients/bin/pip install 'lm_eval[hf,api]' llm
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.__main__ import MODEL
from benchmarks.serving import free_port, wait_ready

NAME = "bench"
CHOICES = """\
task: strop_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """\
task: strop_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
QUESTIONS = [
    ("The capital of France is", [" Paris", " London", " a small village near the sea"], 0),
    ("Water freezes at", [" 0 degrees Celsius", " 50 degrees Celsius", " noon"], 0),
    ("Two plus two is", [" five", " four", " 22", " a number which nobody has ever seen"], 1),
    ("def add(a, b):\n    return", [" a + b", " a - b", "\n"], 0),
    ("Un café, s'il vous", [" plaît", " plait", " 请"], 0),
    ("The opposite of hot is", [" cold", " warm", " hot"], 0),
    ("In 1969 the first people walked on the", [" Moon", " Sun", " 1969"], 0),
    ("a a a a a a a a a a a a", [" a", " b", "a"], 0),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun is up again.",
    "for i in range(10):\n    if i % 2:\n        print(i, i ** 2)\n",
    "Ein Satz auf Deutsch; 12 345 Zeichen, ungefähr. Und noch einer!",
    "word " * 150,
]
PROMPTS = ["Name three colours.", "What is 12 + 30?", "Write one short sentence about the sea."]


def run(python: str, *args: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-m", *args], capture_output=True, text=True, check=False, env={**kept, **environment}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def write_tasks(folder: Path) -> None:
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    for name, template, lines in (("choices", CHOICES, rows), ("rolling", ROLLING, [{"text": one} for one in TEXTS])):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(template.format(file=data), encoding="utf-8")


def loglikelihoods(python: str, work: Path, kind: str, model: str, model_args: str) -> tuple[list[float], list[bool]]:
    """Of all rows of both tasks, in order: loglikelihoods, and whether each continuation is the greedy one."""
    output = work / kind
    run(
        python, "lm_eval", "run", "--model", model, "--model_args", model_args,
        "--tasks", "strop_choices,strop_rolling", "--include_path", str(work), "--log_samples",
        "--output_path", str(output), "--batch_size", "4",
        "--device", "cpu", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(work / "cache"), TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    values: list[float] = []
    greedy: list[bool] = []
    for task in ("strop_choices", "strop_rolling"):
        [path] = output.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for [answer] in sample["resps"]:
                value = answer if isinstance(answer, list) else [answer]
                values.append(float(value[0]))
                greedy += [str(one) == "True" for one in value[1:]]
    return values, greedy


def compare_lm_eval(python: str, model: Path, port: int, work: Path) -> None:
    write_tasks(work)
    url = f"http://127.0.0.1:{port}/v1/completions"
    over_http = f"model={NAME},base_url={url},tokenizer={model},tokenizer_backend=huggingface,num_concurrent=4"
    ours, our_greedy = loglikelihoods(python, work, "http", "local-completions", over_http)
    theirs, their_greedy = loglikelihoods(python, work, "hf", "hf", f"pretrained={model},dtype=float32")
    assert len(ours) == len(theirs) > 20 and len(our_greedy) == len(their_greedy)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    same = sum(a == b for a, b in zip(our_greedy, their_greedy, strict=True))
    print(
        f"lm_eval: {len(ours)} loglikelihoods from {min(theirs):.1f} to {max(theirs):.3f}, largest difference "
        f"{largest:.2g}; is_greedy equal {same} of {len(our_greedy)}",
        flush=True,
    )
    if largest > 1e-4 or same != len(our_greedy):
        raise SystemExit("lm_eval over HTTP differs from the hf model in process")


def ask(port: int, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"model": NAME, "temperature": 0, "max_tokens": 40, **body}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]


def compare_llm(python: str, port: int, work: Path) -> None:
    base = f"http://127.0.0.1:{port}/v1"
    (work / "extra-openai-models.yaml").write_text(
        f"- {{model_id: chat, model_name: {NAME}, api_base: '{base}'}}\n"
        f"- {{model_id: text, model_name: {NAME}, api_base: '{base}', completion: true}}\n",
        encoding="utf-8",
    )
    num_equal = 0
    for prompt in PROMPTS:
        expected = {
            "chat": ask(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]})["message"][
                "content"
            ],
            "text": ask(port, "/v1/completions", {"prompt": prompt})["text"],
        }
        for model, text in expected.items():
            for how in ((), ("--no-stream",)):
                options = ("-o", "temperature", "0", "-o", "max_tokens", "40")
                found = run(python, "llm", "-m", model, *options, *how, prompt, LLM_USER_PATH=str(work))
                if found.rstrip("\n") != text.rstrip("\n"):
                    raise SystemExit(f"llm -m {model} {' '.join(how)}: {found!r} instead of {text!r}")
                num_equal += 1
    print(f"llm: {num_equal} of {num_equal} texts as the server gives them (chat and completion, streamed and whole)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with lm_eval[hf,api] and llm")
    parser.add_argument("--model", type=Path, default=MODEL)
    arguments = parser.parse_args()
    model, port = arguments.model.resolve(), free_port()
    serve = [sys.executable, "-m", "strop.cli.main", "serve", f"{NAME}={model}", "--port", str(port)]
    with (
        tempfile.TemporaryDirectory() as work,
        tempfile.TemporaryFile() as log,
        subprocess.Popen([*serve, "--dtype", "float32"], stdout=log, stderr=log) as process,
    ):
        try:
            if not wait_ready(port, process):
                log.seek(0)
                raise SystemExit(f"strop serve did not start: {log.read().decode(errors='replace')[-2000:]}")
            compare_lm_eval(arguments.python, model, port, Path(work))
            compare_llm(arguments.python, port, Path(work))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
