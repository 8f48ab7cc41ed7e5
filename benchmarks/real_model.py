"""A real model beside the strongest things a user could do without memory: many evaluations in parallel on one device.

Usage: python -m benchmarks.real_model pack --shared ../shared/data --python python/test.jsonl --data runs/data-eval
       python -m benchmarks.real_model run --backbone FOLDER --model gates=FOLDER --model adapted=FOLDER
           [--control FOLDER] [--data runs/data-eval] --out OUT [--device cuda] [--processes 10] [--limit 540]
       python -m benchmarks.real_model table --out OUT

``pack`` copies held-out texts and sets into one folder of a few megabytes; texts stay outside of the tree. ``run``
needs no network. It works through ``longmem eval`` commands, the most important first, in processes that stay, so that
torch starts once in each. Every job writes its result into a folder of its own as soon as it is done; jobs that have
one are not run again. ``log.txt`` has a line for each job. ``table`` (also at the end of ``run``) prints what was
measured, as Markdown, and writes it to ``table.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from longmem.data.tokens import PROJECT_SEPARATOR
from longmem.evaluation.results import Bootstrap, percent

SETS = ("books", "latex", "python")
ICL = ("sst2", "mr", "subj", "sst5", "mpqa")
RETRIEVED, PASSAGE, QUERY, STRIDE = 256, 128, 64, 256  # tokens: of the window, of a passage, of a query, of a move


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    documents: int
    tokens: str
    long_tokens: str
    sessions: int
    facts: int
    between: tuple[str, ...]
    trials: int
    lengths: tuple[str, ...]
    seeds: int
    texts: int
    shots: int
    questions: int
    batch: int


SIZES = {
    "gpu": Size(8, "32k", "96k", 10, 10, ("1k", "16k", "128k"), 8, ("1k,4k,16k", "64k", "1m"), 6, 30, 2000, 100, 8),
    # about three hours of two cores that know bfloat16
    "cpu": Size(6, "8k", "32k", 10, 10, ("1k", "16k", "128k"), 8, ("1k,4k,16k,64k", "1m"), 6, 10, 2000, 40, 4),
    "tiny": Size(1, "3k", "4k", 1, 1, ("1k",), 1, ("1k",), 1, 1, 20, 2, 2),
}


@dataclass(frozen=True)
class Job:
    """A name, which is its folder, and the arguments of ``longmem eval``; ``bm25`` is ``retrieved`` below."""

    name: str
    arguments: tuple[str, ...]


def jobs(given: argparse.Namespace) -> list[Job]:
    """All jobs, the most important first."""
    size, data = SIZES[given.size], Path(given.data)
    models = dict(pair.split("=", 1) for pair in given.model)
    at = ("--device", given.device, "--dtype", given.dtype, "--resamples", "1000")
    found: list[tuple[int, Job]] = []

    def add(rank: int, name: str, *arguments: object) -> None:
        found.append((rank, Job(name, (*map(str, arguments), *at))))

    def reader(name: str, *, control: bool = False) -> list[str]:
        """The reader ``name`` beside the backbone, and the control where it stands on the same kind of model."""
        mine = ["--model", models[name], "--backbone", given.backbone]
        also = control and given.control and model_kind(models[name]) == "longmem"
        return [*mine, "--control", given.control] if also else mine

    def texts(kind: str, tokens: str) -> list[object]:
        files = sorted((data / "text" / kind).glob("*")) or [data / "text" / kind]
        spread = files[:: max(1, len(files) // size.documents)][: size.documents]  # documents of all projects
        return [*(part for file in spread for part in ("--data", file)), "--max-tokens", tokens]

    sizes = "8k,32k" if tokens_of(size.tokens) > 8192 else "8k"
    for kind in SETS:
        plain, batch = texts(kind, size.tokens), ["--batch", size.batch]
        for name in models:
            known = ["perplexity", *reader(name, control=True), *plain, *batch, "--window", 1024]
            add(0, f"sliding-{kind}-{name}", *known, "--protocol", "sliding", "--memory-sizes", sizes)
            add(4, f"segments-{kind}-{name}", *known, "--protocol", "segments", "--memory-sizes", "32k")
            far = ["--memory-sizes", "64k", "--window", 1024, *batch, "--protocol", "sliding"]
            add(5, f"long-{kind}-{name}", "perplexity", *reader(name), *texts(kind, size.long_tokens), *far)
        for window in (1024, 2048, 4096, 8192):
            wide = ["--batch", max(1, size.batch * 1024 // window), "--window", window, "--protocol", "sliding"]
            add(1, f"sliding-{kind}-window{window}", "perplexity", "--model", given.backbone, *plain, *wide)
        wide = ["--batch", max(1, size.batch // 8), "--window", 8192, "--protocol", "sliding"]
        long = texts(kind, size.long_tokens)
        add(5, f"long-{kind}-window8192", "perplexity", "--model", given.backbone, *long, *wide)
        paper = ["--training-free", "0.1", "--memory-sizes", "8k", "--window", 1024, "--protocol", "sliding", *batch]
        add(4, f"sliding-{kind}-paper", "perplexity", "--model", given.backbone, *plain, *paper)
        add(2, f"sliding-{kind}-bm25", "bm25", "--backbone", given.backbone, *plain, *batch)
    hay = ["--data", data / "haystack"]
    for name in models:
        known, longmem = [*reader(name), "--window", 1024], model_kind(models[name]) == "longmem"

        def remembers(count: int, longmem: bool = longmem) -> list[object]:
            """So many tokens of memory, and not what a SideNet is without any."""
            return ["--memory-sizes", count, *(["--systems", f"backbone,memory_{count}"] if longmem else [])]

        some = remembers(65536)
        for between in size.between:
            told = ["--between", between, "--sessions", size.sessions, "--facts", size.facts, "--batch", 8]
            add(1, f"facts-{between}-{name}", "facts", *known, *remembers(tokens_of(between) + 8192), *hay, *told)
        for rank, lengths in zip((2, 3, 6), size.lengths, strict=False):
            of, trials = lengths.replace(",", "-"), max(1, size.trials if "m" not in lengths else size.trials // 2)
            held = remembers(max(map(tokens_of, lengths.split(","))))
            depths = ["--depths", "5", "--trials", trials, "--batch", 16]
            add(rank, f"needle-{of}-{name}", "needle", *known, *held, *hay, "--lengths", lengths, *depths)
            story = ["--data", data / "babi", "--text", data / "haystack", "--trials", -(-3 * trials // 2)]
            again = ["--recall", 5] if rank == 2 else []
            # a million tokens are read once for all tasks
            for tasks in ("1,2,3,4,5",) if "m" in lengths else "12345":
                asked = [*story, "--batch", 16, "--tasks", tasks, "--lengths", lengths, *again]
                add(rank, f"babi{tasks.replace(',', '')}-{of}-{name}", "babi", *known, *held, *asked)
        limit = ["--seeds", size.seeds, "--limit", size.texts, "--batch", 32]
        shots = ["--local-shots", "4,20", "--memory-shots", f"0,{size.shots}"]
        for dataset in ICL:
            asked = ["--data", data / "icl", "--datasets", dataset, *shots, *limit]
            add(3, f"icl-{dataset}-{name}", "icl", *known, *some, *asked)
        many = ["--local-shots", "20", "--memory-shots", f"0,{size.shots}"]
        limit = ["--seeds", 1, "--limit", size.texts + size.texts // 3, "--batch", 64]
        for dataset in ("banking77", "clinc150"):
            asked = ["--data", data / "icl", "--datasets", dataset, *many, *limit]
            add(4, f"icl-{dataset}-{name}", "icl", *known, *some, *asked)
        spoken = ["--data", data / "locomo.json", "--questions", max(1, size.questions // 5), "--recall", 5]
        spoken += ["--no-bleu", "--new-tokens", 24, *(["--conversations", 1] if given.size == "tiny" else [])]
        add(3, f"locomo-{name}", "dialogue", *known, *some, *spoken, "--batch", 16)
        asked = ["--train", data / "squad-train.json", "--data", data / "squad-dev.json", "--local-shots", 2]
        asked += ["--memory-shots", f"0,{min(100, size.shots)}", "--limit", size.questions, "--batch", 16]
        add(5, f"squad-{name}", "squad", *known, *some, *asked)
        chapters = ["--data", data / "chapterbreak.json", "--prefix", "4k,8k", "--limit", max(1, size.questions // 3)]
        add(5, f"chapterbreak-{name}", "chapterbreak", *known, *some, *chapters, "--batch", 12)
    chosen = [job for _, job in sorted(found, key=lambda pair: pair[0])]
    return [job for job in chosen if any(fnmatch(job.name, pattern) for pattern in given.only.split(","))]


def tokens_of(short: str) -> int:
    """``16k``, ``1m``."""
    return int(short[:-1]) * {"k": 1 << 10, "m": 1 << 20}[short[-1]]


def model_kind(folder: str) -> str:
    from longmem.modeling.checkpoints import checkpoint_folder, model_type

    return model_type(checkpoint_folder(folder))


# running


def run(given: argparse.Namespace) -> None:
    """All jobs that have no result yet, in processes side by side, until the time is up."""
    out, began = Path(given.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs(given) if not list((out / job.name).glob("*.json"))]
    context = multiprocessing.get_context("spawn")
    ask, told = context.Queue(), context.Queue()
    for job in waiting:
        ask.put(job)
    for _ in range(given.processes):
        ask.put(None)
    workers = [context.Process(target=work, args=(ask, told, given)) for _ in range(given.processes)]
    for worker in workers:
        worker.start()
    left, log = len(waiting), (out / "log.txt").open("a", encoding="utf-8")
    while left and any(worker.is_alive() for worker in workers) and time.monotonic() - began < given.limit:
        try:
            line = told.get(timeout=1)
        except queue.Empty:
            continue
        left -= 1
        for file in (sys.stdout, log):
            print(f"{time.monotonic() - began:6.0f} s  {line}", file=file, flush=True)
    if left:
        print(f"{left} jobs are not done; the same command goes on with them", flush=True)
    for worker in workers:
        worker.terminate()
    log.close()
    table(given)


def work(ask: Any, told: Any, given: argparse.Namespace) -> None:
    """One process: jobs from the queue until there is none."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    from longmem.evaluation import report

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    report.plot_all = lambda result, folder: []  # pictures can be drawn later, from the results
    while (job := ask.get()) is not None:
        folder, began = Path(given.out) / job.name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            said = do(job, folder)
        gc.collect()
        space = ""
        if torch.cuda.is_available():
            space = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            torch.cuda.empty_cache()
        told.put(f"{job.name}: {said} after {time.monotonic() - began:.0f} s{space}")


def do(job: Job, folder: Path) -> str:
    """``done``, or what went wrong."""
    from longmem.__main__ import main as longmem

    try:
        if job.arguments[0] == "bm25":
            retrieved(list(job.arguments[1:]), folder)
            return "done"
        arguments = ["eval", *job.arguments, "--out", str(folder)]
        sys.argv = ["longmem", *arguments]  # for the result's header
        longmem(arguments)
    except SystemExit as ended:
        return f"FAILED ({ended.code}), see {folder / 'log.txt'}" if ended.code else "done"
    except Exception as problem:
        traceback.print_exc()
        return f"FAILED ({type(problem).__name__}: {str(problem)[:200]})"
    return "done"


def retrieved(arguments: list[str], folder: Path) -> None:
    """Perplexity of the backbone with passages of the text itself in its window, found by BM25 (FTS5).

    A window of 1,024 tokens moves by 256. Once with all of it the text just before; once with 256 tokens in
    front for passages that have left the window, found with the last 64 tokens before those that are scored.
    """
    from longmem.chat import PlainTexts, Recall
    from longmem.data.text import TextSource, read_documents
    from longmem.data.tokens import load_tokenizer, tokenize_documents
    from longmem.evaluation.results import write_json
    from longmem.modeling.loading import load_backbone, named_dtype

    parser = argparse.ArgumentParser()
    for name in ("--backbone", "--device", "--dtype", "--max-tokens", "--resamples"):
        parser.add_argument(name)
    parser.add_argument("--data", action="append")
    parser.add_argument("--batch", type=int)
    given = parser.parse_args(arguments)
    model = load_backbone(given.backbone, None, named_dtype(given.dtype)).eval().to(given.device)
    tokenizer = load_tokenizer(given.backbone)
    texts = list(read_documents(TextSource(tuple(given.data))))
    most = tokens_of(given.max_tokens)
    found = []
    for document in tokenize_documents(texts, tokenizer, max_tokens=most):
        ids, held = document.ids.tolist(), dict[str, str]()
        recall, rows = Recall(PlainTexts(held), ""), dict[str, list[tuple[list[int], int]]]()
        for start in range(0, len(ids) - 1, STRIDE):
            end = min(start + STRIDE, len(ids) - 1)
            scored, reach, near = end - start, max(0, end - 1024), max(0, end - (1024 - RETRIEVED))
            rows.setdefault(f"window, stride {STRIDE}", []).append((ids[reach : end + 1], scored))
            while (len(held) + 1) * PASSAGE <= near:
                held[str(len(held))] = tokenizer.decode(ids[len(held) * PASSAGE : (len(held) + 1) * PASSAGE])
            passages: list[int] = []
            query = tokenizer.decode(ids[max(0, start - QUERY) : start + 1])
            for passage in recall.search(query, 12) if held else ():
                more = tokenizer(passage.text + "\n", add_special_tokens=False)["input_ids"]
                if len(passages) + len(more) <= RETRIEVED:
                    passages = more + passages
            # the first windows need no retrieval: all of the text is in them
            local = ids[near if passages else reach : end + 1]
            rows.setdefault(f"bm25, stride {STRIDE}", []).append((passages + local, scored))
        sums = {
            name: sum(nats(model, windows[n : n + given.batch]) for n in range(0, len(windows), given.batch))
            for name, windows in rows.items()
        }
        found.append({"id": document.id, "tokens": document.scored, "nll": {"sliding": sums}})
        print(document.id, {name: round(math.exp(value / document.scored), 3) for name, value in sums.items()})
    header = {"task": "bm25", "command": "bm25 " + " ".join(arguments)}
    write_json(folder / "bm25.json", {"header": header, "documents": found})


def nats(model: Any, windows: list[tuple[list[int], int]]) -> float:
    """Of the last so many tokens of each window, summed."""
    import torch

    longest = max(len(ids) for ids, _ in windows)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in windows], device=model.device)
    total = 0.0
    with torch.inference_mode():
        hidden = model.base_model(input_ids=padded[:, :-1], use_cache=False).last_hidden_state
        for row, (ids, scored) in enumerate(windows):
            where = slice(len(ids) - 1 - scored, len(ids) - 1)
            logits = model.get_output_embeddings()(hidden[row, where]).float()
            targets = padded[row, where.start + 1 : where.stop + 1]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total


# what was measured


def table(given: argparse.Namespace) -> None:
    """Perplexity against the backbone's windows, as Markdown; ``longmem report OUT`` has every task."""
    results = {path.parent.name: json.loads(path.read_text()) for path in sorted(Path(given.out).glob("*/*.json"))}
    text = "\n".join(perplexities(results)) + "\n"
    (Path(given.out) / "table.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def perplexities(results: dict[str, Any]) -> list[str]:
    """Each set's systems: perplexity, and % against windows of the backbone on the same documents.

    Intervals draw projects, then their documents.
    """
    found: dict[tuple[str, str], dict[str, dict[str, tuple[float, int]]]] = {}
    for name, result in results.items():
        if "documents" not in result:
            continue
        kind, of = name.split("-")[1], name.split("-")[2]
        length = "long" if name.startswith("long") else "short"
        for document in result["documents"]:
            for protocol, systems in document["nll"].items():
                for system, nll in systems.items():
                    label = f"{of}: {system}"
                    if system == "backbone":
                        label = of if of.startswith("window") else "window1024"
                    place = found.setdefault((f"{kind}, {length}", protocol), {}).setdefault(label, {})
                    place[document["id"]] = (nll, document["tokens"])
    against = ("window1024", "window8192")
    lines = [f"| texts | system | documents | perplexity | {' | '.join(f'% against {name}' for name in against)} |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for (kind, protocol), systems in found.items():
        for label, documents in sorted(systems.items()):
            count = sum(tokens for _, tokens in documents.values())
            value = math.exp(sum(nll for nll, _ in documents.values()) / count)
            changes = [change(documents, systems.get(name, {})) if name != label else "" for name in against]
            lines.append(f"| {kind}, {protocol} | {label} | {len(documents)} | {value:.3f} | {' | '.join(changes)} |")
    return lines


def change(documents: dict[str, tuple[float, int]], others: dict[str, tuple[float, int]]) -> str:
    """Of perplexity on the documents that both have, % [95 % interval]."""
    both = [name for name in documents if name in others]
    if not both:
        return ""
    gains = np.array([documents[name][0] - others[name][0] for name in both])
    tokens = np.array([documents[name][1] for name in both], dtype=float)
    mean = percent(gains.sum() / tokens.sum())
    projects = [name.partition(PROJECT_SEPARATOR)[0] for name in both]
    drawn = Bootstrap().interval(gains, tokens, "documents", projects, percent)
    return f"{mean:+.1f}" + (f" [{drawn['low']:+.1f}, {drawn['high']:+.1f}]" if drawn else "")


# data


def pack(given: argparse.Namespace) -> None:
    """Held-out texts and sets, no more than the jobs need, in one folder."""
    import shutil
    import subprocess

    from longmem.data.text import TextSource, read_documents

    shared, data = Path(given.shared), Path(given.data)

    def documents(path: Path, *include: str) -> list[Any]:
        return sorted(read_documents(TextSource((str(path),), include=include)), key=lambda document: document.id)

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    for document in documents(shared / "books/test.tar.xz")[:12]:
        write(data / "text/books" / Path(document.id).name, document.text[:460_000])
    latex = documents(shared / "latex/test.tar.xz")
    long = [document for document in latex if len(document.text) > 130_000]
    projects = [[d for d in long if ("clowder" in d.id) is clowder][:6] for clowder in (True, False)]
    for document in (document for some in projects for document in some):
        write(data / "text/latex" / Path(document.id).name, document.text[:340_000])
    taken: dict[str, int] = {}
    for line in Path(given.python).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        # packages__networkx-00 -> networkx__00: intervals draw packages
        project, _, name = record["id"].partition("__")
        if project == "packages":
            project, _, name = name.partition("-")
        taken[project] = taken.get(project, 0) + (len(record["text"]) > 120_000)
        if len(record["text"]) > 120_000 and taken[project] <= 3:
            write(data / "text/python" / f"{project}__{name}.py", record["text"][:340_000])
    text, number = "\n\n".join(d.text for d in documents(shared / "books/valid.tar.xz")[:9])[:5_600_000], 0
    while text:
        cut = text.find("\n", 250_000) + 1 or len(text)
        write(data / "haystack" / f"{number:02}.txt", text[:cut])
        text, number = text[cut:], number + 1
    for document in documents(shared / "babi/babi.tar.xz", *(f"en/qa{n}_*" for n in range(1, 6))):
        write(data / "babi" / document.id, document.text)
    for folder, files in {
        "SST-2": ("train.tsv", "dev.tsv"), "mr": ("train.csv", "test.csv"), "subj": ("train.csv", "test.csv"),
        "sst-5": ("stsa.fine.train", "stsa.fine.dev"), "mpqa": ("train.csv", "test.csv"),
        "../icl_banking77": ("train.csv", "test.csv"), "../icl_clinc150": ("data_full.json.gz",),
    }.items():  # fmt: skip
        for file in files:
            (data / "icl" / Path(folder).name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shared / "icl" / folder / file, data / "icl" / Path(folder).name / file)
    squad = json.loads((shared / "xquad_en/xquad.en.json").read_text(encoding="utf-8"))
    half = len(squad["data"]) // 2
    for name, articles in (("train", squad["data"][:half]), ("dev", squad["data"][half:])):
        write(data / f"squad-{name}.json", json.dumps({"version": "1.1", "data": articles}))
    wanted = ("sample_id", "conversation", "qa")
    spoken = json.loads((shared / "locomo/locomo10.json").read_text(encoding="utf-8"))
    write(data / "locomo.json", json.dumps([{name: one[name] for name in wanted} for one in spoken]))
    recipe = [sys.executable, "recipes/data/chapterbreak.py", str(shared / "books/test.tar.xz"), "--per-book", "3"]
    subprocess.run([*recipe, "--out", str(data / "chapterbreak")], check=True)
    made = next((data / "chapterbreak").glob("chapterbreak_ctx_*.json"))
    shutil.move(made, data / "chapterbreak.json")
    shutil.rmtree(data / "chapterbreak")
    files = [path for path in data.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{len(files)} files, {size:.1f} MiB, in {data}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "run", "table", "list"))
    parser.add_argument("--shared", default="../shared/data")
    parser.add_argument("--python", help="JSON lines of held-out packages, as recipes/data/python.py writes them")
    parser.add_argument("--data", default="runs/data-eval")
    parser.add_argument("--backbone")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="a LongMem or TrainingFree")
    parser.add_argument("--control")
    parser.add_argument("--out", default="runs/real-model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--limit", type=float, default=540, help="seconds")
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--only", default="*", help="patterns of job names, by comma")
    given = parser.parse_args(arguments)
    if given.what == "list":
        for job in jobs(given):
            print(job.name, " ".join(job.arguments))
        return
    {"pack": pack, "run": run, "table": table}[given.what](given)


if __name__ == "__main__":
    main()
