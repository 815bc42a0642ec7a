"""Serving rows: questions of 64 clients to `vilt-fast serve`, beside `score` on the same pairs.

ViLT-B/32 with random weights in int8, a photograph (JPEG, some 500 pixels a side) and a question of 8 to 40 tokens a
request. The requests go in four quarters, and after each `score` computes the same pairs in this process, so that both
see the same machine; the clients are one more process, which shares the cores with the service. Images are decoded
anew for each pair by both. `ratio` is the throughput of `score` over that of a row, `error` the largest difference of a
probability. What is in no column is printed: how many requests got an answer, how many answers are those of `score` to
the last bit, the 50th and 95th percentile of what a client waits, the memory of the service after each quarter, and the
processor time of all three, which other programs on the machine do not change much.

`python -m benchmarks.serve` is the clients.
"""

import asyncio
import json
import sys
import time

from . import table

CASES = ("short", "load")
_REQUESTS = {"short": 200, "load": 2000}
CLIENTS, PHOTOGRAPHS, QUARTERS, TOP_K = 64, 64, 4, 5


def rows(cases, workers, step=lambda what: None):
    """Rows without the columns of the machine; `workers` of the service, or None for its default."""
    return [row for case in cases for row in _case(case, workers, step)]


def _case(case, workers, step):
    import tempfile
    from pathlib import Path

    import vilt_fast
    from vilt_fast.commands import checkpoint

    step(f"{case}: a model and photographs")
    count, model = _REQUESTS[case], checkpoint.random_vqa()
    files, sizes, questions, process = _inputs(model.config, count)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        process.save_pretrained(folder)
        # Read from the same file: what a library's product rounds to depends on where in memory its weights begin.
        model = vilt_fast.accelerate(checkpoint.load(folder), quantize="int8")
        with _service(folder, workers, Path(folder) / "told.txt") as (port, pid):
            _asked(port, files, questions[:CLIENTS])  # warm on both sides
            _scored(model, process, files, questions[:8], 0)
            served, scored, memory, waits, got, expected = [], [], [], [], [], []
            spent = dict.fromkeys(("service", "clients", "score"), 0.0)
            for quarter in range(QUARTERS):
                start, end = (count * n // QUARTERS for n in (quarter, quarter + 1))
                step(f"{case}: quarter {quarter + 1}, the service")
                spent["service"] -= _processor(pid)
                seconds, answers, waited, busy = _asked(port, files, questions[start:end], start)
                spent["service"] += _processor(pid)
                spent["clients"] += busy
                served.append(seconds / (end - start))
                got += answers
                waits += waited
                memory.append(_memory(pid))
                step(f"{case}: quarter {quarter + 1}, score")
                before, spent["score"] = time.perf_counter(), spent["score"] - time.process_time()
                expected += _scored(model, process, files, questions[start:end], start)
                scored.append((time.perf_counter() - before) / (end - start))
                spent["score"] += time.process_time()
    each = ", ".join(f"{who} {1e3 * seconds / count:.1f}" for who, seconds in spent.items())
    print(f"{case}: processor milliseconds a request: {each}", file=sys.stderr)
    work = _work(sizes, questions, model.config)
    return _rows(case, count, served, scored, memory, waits, got, expected, work)


def _work(sizes, questions, config):
    """(FLOPs, bytes) of a pair, on average."""
    from vilt_fast.images.reference import target_size

    from . import cases

    patch = config.patch_size
    grids = [target_size(*size, config.image_size, patch) for size in sizes]
    patches = [grids[n % len(grids)][0] // patch * (grids[n % len(grids)][1] // patch) for n in range(len(questions))]
    lengths = [len(question.split()) + 2 + 1 + p for question, p in zip(questions, patches, strict=True)]
    total = cases.flops(lengths, patches, config), cases.traffic(lengths, config, 1, 4)
    return tuple(part / len(questions) for part in total)


def _rows(case, count, served, scored, memory, waits, got, expected, work):
    from vilt_fast.commands import report

    same = sum(one == other for one, other in zip(got, expected, strict=True))
    lost = sum(answers is None for answers in got)
    waits = sorted(waits)
    p50, p95 = (1e3 * waits[int(len(waits) * share)] for share in (0.5, 0.95))
    told = f"p50 {p50:.0f} ms, p95 {p95:.0f} ms; MiB after each quarter: {', '.join(f'{m:.0f}' for m in memory)}"
    print(f"{case}: {lost} of {count} requests lost, {same} answers equal to the last bit; {told}", file=sys.stderr)
    worst = max(
        (abs(a["score"] - b["score"]) for one, other in zip(got, expected, strict=True) if one
         for a, b in zip(one, other, strict=True)),
        default=float("nan"),
    )  # fmt: skip
    base, made = report.quantiles(scored)[1], []
    for name, seconds, error in (("score_int8", scored, 0.0), ("service_int8", served, worst)):
        made.append({
            "subject": "serve", "provider": name, "backend": "cpp", "model": "random weights", "case": case,
            "shape": f"{count} requests of {CLIENTS} clients", "dtype": "int8",
            **table.times(report.quantiles(seconds), base), "error": error, "flops": work[0], "bytes": work[1],
        })  # fmt: skip
    return made


def _inputs(config, count):
    """(files of photographs, (height, width) of each, questions, a processor that knows their words)."""
    import io

    import numpy as np
    from PIL import Image
    from transformers import ViltProcessor

    from vilt_fast.commands import samples

    draw, files, sizes = np.random.default_rng(0), [], []
    for number, (image, _) in enumerate(samples.scenes(PHOTOGRAPHS)):
        top, left = draw.integers(0, 24, 2)  # none of them is another one
        file = io.BytesIO()
        Image.fromarray(image[top:, left:]).save(file, "JPEG", quality=88 + number % 5)
        files.append(file.getvalue())
        sizes.append((image.shape[0] - int(top), image.shape[1] - int(left)))
    words = [f"word{n}" for n in range(500)]
    lengths = draw.integers(6, 39, count)  # with [CLS] and [SEP] 8 to 40 tokens
    questions = [" ".join(words[n] for n in draw.integers(0, len(words), length)) for length in lengths]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    process = ViltProcessor(samples.image_processor(config), samples.word_tokenizer(special + words))
    return files, sizes, questions, process


def _scored(model, process, files, questions, start):
    """The answers of `score`, as the service tells them."""
    import vilt_fast

    images = [bytes(bytearray(files[(start + n) % len(files)])) for n in range(len(questions))]  # each its own
    pairs = [(n, n) for n in range(len(questions))]
    found = vilt_fast.score(model, questions, images, pairs=pairs, top_k=TOP_K, processor=process, progress=False)
    return [
        [{"answer": name, "score": share} for name, share in found.answer(n)] for n in range(len(questions))
    ]  # fmt: skip


def _service(folder, workers, log):
    """A context manager that gives (port, process id) of a service of the model in `folder`."""
    import contextlib
    import subprocess

    import torch

    given = ["--dtype", "int8", "--port", "0", "--threads", str(torch.get_num_threads())]
    given += ["--workers", str(workers)] if workers else []

    @contextlib.contextmanager
    def started():
        with open(log, "w") as file:
            process = subprocess.Popen([sys.executable, "-m", "vilt_fast", "serve", folder, *given], stdout=file)
        try:
            while "http://" not in (told := log.read_text()):
                if process.poll() is not None:
                    raise RuntimeError("vilt-fast serve has ended; what it said is above")
                time.sleep(0.1)
            yield int(told.partition("http://127.0.0.1:")[2].split()[0]), process.pid
            process.terminate()
            if process.wait(60):
                raise RuntimeError("vilt-fast serve did not end well; what it said is above")
        finally:
            process.kill()
            process.wait()

    return started()


def _memory(pid):
    """MiB that a process has in memory."""
    from pathlib import Path

    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def _processor(pid):
    """Seconds of processor time that a process has used."""
    import os
    from pathlib import Path

    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _asked(port, files, questions, start=0):
    """(seconds, answers or None of each request, seconds of each, processor time) by the process of the clients."""
    import base64
    import subprocess

    images = [base64.b64encode(file).decode() for file in files]
    order = [(start + n) % len(files) for n in range(len(questions))]
    work = json.dumps({"port": port, "images": images, "order": order, "questions": questions})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve"], input=work, stdout=subprocess.PIPE, text=True, check=True
    )  # fmt: skip
    found = json.loads(done.stdout)
    return found["seconds"], found["answers"], found["waits"], found["busy"]


# --- the clients: nothing is imported above that they would have to wait for ------------------------------------------


async def _clients(port, images, order, questions):
    bodies = [
        b'{"inputs": {"image": "%s", "question": "%s"}, "parameters": {"top_k": %d}}'
        % (images[image].encode(), question.encode(), TOP_K)
        for image, question in zip(order, questions, strict=True)
    ]
    answers, waits, left = [None] * len(bodies), [0.0] * len(bodies), iter(range(len(bodies)))

    async def client():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for n in left:
            begun = time.perf_counter()
            head = b"POST /vqa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(bodies[n]) + bodies[n])
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length:")[2].split()[0])
            content = await reader.readexactly(length)
            waits[n] = time.perf_counter() - begun
            if b" 200 " in answer.partition(b"\r\n")[0]:
                answers[n] = json.loads(content)
        writer.close()

    start, before = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(min(CLIENTS, len(bodies)))))
    seconds, busy = time.perf_counter() - start, time.process_time() - before
    return {"seconds": seconds, "busy": busy, "answers": answers, "waits": waits}


if __name__ == "__main__":
    json.dump(asyncio.run(_clients(**json.load(sys.stdin))), sys.stdout)
