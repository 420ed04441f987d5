"""The server's edges: bodies, hosts, keys, a full queue, clients that go away, and many of them at once."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from paley.core.errors import PaleyError
from paley.pipeline.conversation import chat_ids
from paley.pipeline.detokenizing import Detokenizer
from paley.pipeline.sampling import Sampling
from paley.serve import Limits, create_app
from paley.serve.protocol import ChatMessage
from paley.serve.run import listen, run
from paley.serve.scheduler import Busy, Job, Scheduler
from scripted_decoder import chatting, scripted_model

CHAT = "/v1/chat/completions"


def post(url: str, path: str, body: bytes | dict, **headers: str) -> tuple[int, dict, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    return response.status, found, response.headers


def get(url: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    found = response.read().decode()
    connection.close()
    return response.status, found


def asking(text: str, **more: object) -> dict:
    return {"model": "scripted", "prompt": text, "temperature": 0, "max_tokens": 500} | more


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model":', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON|parsing the body"),
        (b"\xff\xfe", "not valid JSON|parsing the body"),
        (b"[]", "must be a JSON object"),
        (b'{"model": "scripted", "messages": "hi"}', "messages: "),
        (b'{"model": 3, "messages": [{"role": "user", "content": "hi"}]}', "model: "),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "n": 1.5}', "n: "),
    ],
)
def test_malformed_requests_get_openais_form_of_error(serve, body, words):
    status, found, _ = post(serve().url, CHAT, body)
    assert status == 400
    assert found["error"].keys() == {"message", "type", "param", "code"}
    assert any(word in found["error"]["message"] for word in words.split("|"))


def test_a_body_has_a_limit_and_a_type(serve):
    url = serve(limits=Limits(body=1000)).url
    assert post(url, CHAT, b"x" * 1001)[0] == 413
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    chunks = iter([b"y" * 600, b"y" * 600])
    connection.request("POST", CHAT, chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    with connection.getresponse() as response:
        assert response.status == 413
    connection.close()
    plain = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}).encode()
    status, found, _ = post(url, CHAT, plain, **{"Content-Type": "text/plain"})
    assert (status, "Content-Type: application/json" in found["error"]["message"]) == (400, True)


def test_who_may_come(serve):
    url = serve(api_key="right", limits=Limits(hosts=frozenset({"127.0.0.1"}))).url
    assert get(url, "/v1/models")[0] == 401
    assert get(url, "/metrics")[0] == 401
    assert get(url, "/metrics", Authorization="Bearer right")[0] == 200
    assert get(url, "/health")[0] == 200
    assert get(url, "/")[0] == 200
    assert get(url, "/health", Host="evil.example:80")[0] == 403
    assert get(url, "/nothing", Authorization="Bearer right")[0] == 404


def test_a_full_queue_says_when_to_come_again(serve):
    server = serve("a long answer of many tokens", seconds=0.05, limits=Limits(slots=1, queue=1))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: post(server.url, "/v1/completions", asking(f"{n}>")), range(6)))
    statuses = sorted(status for status, _, _ in found)
    assert statuses.count(200) >= 2
    assert statuses.count(429) == 6 - statuses.count(200) >= 1
    (_, body, headers) = next(entry for entry in found if entry[0] == 429)
    assert body["error"]["code"] == "queue_full"
    assert 1 <= int(headers["Retry-After"]) <= 60


def test_more_answers_than_ever_fit_are_refused_before_a_prompt_is_read(serve, monkeypatch):
    server = serve(limits=Limits(slots=1, queue=2))
    read = []
    monkeypatch.setattr("paley.serve.app.prompt_ids", lambda *args: read.append(args))
    monkeypatch.setattr("paley.serve.app.chat_ids", lambda *args: read.append(args))
    status, found, _ = post(server.url, "/v1/completions", asking(["a>", "b>"], n=2))  # type: ignore[arg-type]
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    assert "are 4, and can never be more than 3" in found["error"]["message"]
    status, _, _ = post(server.url, CHAT, {"model": "scripted", "messages": [{"role": "user", "content": "a"}], "n": 4})
    assert status == 400
    status, found, _ = post(serve().url, "/v1/completions", asking(["a>"] * 17))  # type: ignore[arg-type]
    assert (status, "can never be more than 16" in found["error"]["message"]) == (400, True)
    assert read == []


def test_a_decoder_that_has_ended_is_no_full_queue(serve):
    server = serve()
    server.scheduler.stop()
    status, found, headers = post(server.url, "/v1/completions", asking("a>"))
    assert (status, found["error"]["type"], found["error"]["code"]) == (503, "server_error", None)
    assert found["error"]["message"] == "the server is stopping"
    assert "Retry-After" not in headers


def test_a_decoder_that_crashed_says_so(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(server.scheduler, "_round", lambda: 1 / 0)
    assert post(server.url, "/v1/completions", asking("a>"))[0] == 500
    status, found, _ = post(server.url, "/v1/completions", asking("a>"))
    assert (status, "has ended" in found["error"]["message"]) == (503, True)


def test_jobs_that_enter_are_counted(tiny_tokenizer, monkeypatch):
    """While a slot is being filled, its job is neither in the queue nor running."""
    model, _ = scripted_model(tiny_tokenizer, lambda ids: 70)
    scheduler = Scheduler(model, slots=1, waiting=0)
    inside, go = threading.Event(), threading.Event()
    take = scheduler._pool.take
    monkeypatch.setattr(scheduler._pool, "take", lambda ids: (inside.set(), go.wait(10), take(ids))[2])
    jobs = [Job([5], Sampling(), 10**6, lambda event: None) for _ in range(2)]
    scheduler.start()
    try:
        scheduler.submit(jobs[:1])
        assert inside.wait(10)
        assert scheduler.load == (1, 0)
        with pytest.raises(Busy):
            scheduler.submit(jobs[1:])
    finally:
        go.set()
        scheduler.stop()


def test_a_job_cancelled_before_its_first_read_takes_no_place_and_no_part_in_the_seconds(tiny_tokenizer):
    """Its context is empty, and would push out the text that somebody may go on from."""
    model, decoder = scripted_model(tiny_tokenizer, "yes")
    scheduler = Scheduler(model, slots=1, waiting=1)  # not started: its rounds are called here
    kept = decoder.start()
    kept.ids = [5, 6, 7]
    scheduler._pool.put(kept, [5, 6, 7])
    job = Job([9, 9], Sampling(), 5, lambda event: None, submitted=time.monotonic() - 1000)
    scheduler.submit([job])
    scheduler._admit()
    assert scheduler.load == (1, 0)
    scheduler.cancel([job])
    scheduler._admit()
    assert scheduler.load == (0, 0)
    assert decoder.open == [kept]
    assert scheduler._seconds == 1.0


def test_a_bug_is_a_counted_logged_500_in_openais_form(serve, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise OverflowError("secret")

    url = serve().url
    monkeypatch.setattr("paley.serve.app.prompt_ids", fail)
    status, found, _ = post(url, "/v1/completions", asking("a>"))
    assert (status, found["error"]["type"]) == (500, "server_error")
    assert found["error"].keys() == {"message", "type", "param", "code"}
    assert "OverflowError" in found["error"]["message"]
    assert "secret" not in found["error"]["message"]
    assert "secret" in caplog.text
    assert 'paley_requests_total{path="/v1/completions",status="500"} 1.0' in get(url, "/metrics")[1]
    status, found, _ = post(url, "/v1/completions", asking("a>", top_k=10**400))
    assert (status, found["error"]["param"]) == (400, "top_k")


def test_logprobs_are_decoded_beside_the_event_loop(serve, monkeypatch):
    on_loop, decode = [], Detokenizer.would_add

    def noted(text: Detokenizer, number: int) -> str:
        with contextlib.suppress(RuntimeError):
            on_loop.append(asyncio.get_running_loop())
        return decode(text, number)

    monkeypatch.setattr(Detokenizer, "would_add", noted)
    status, found, _ = post(serve().url, "/v1/completions", asking("a>", logprobs=5))
    assert (status, found["choices"][0]["logprobs"]["tokens"][:3]) == (200, ["y", "e", "s"])
    assert on_loop == []


def test_templates_read_the_name_of_a_message(tiny_tokenizer):
    tokenizer = chatting(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['name'] or m.role }}:{{ m.content }}|{% endfor %}"
    messages = [ChatMessage(role="user", content="hi", name="Ann"), ChatMessage(role="user", content="ho")]
    ids = chat_ids(tokenizer, [message.plain() for message in messages])
    assert tokenizer.decode(ids) == "Ann:hi|user:ho|"


def test_a_completion_keeps_its_first_space_and_a_chat_does_not(serve, monkeypatch):
    begun = []
    begin = Detokenizer.__init__
    monkeypatch.setattr(
        Detokenizer,
        "__init__",
        lambda self, tokenizer, before=(): (begun.append(len(before)), begin(self, tokenizer, before))[1],
    )
    url = serve().url
    assert post(url, "/v1/completions", asking("ab>"))[0] == 200
    assert post(url, CHAT, {"model": "scripted", "messages": [{"role": "user", "content": "a"}]})[0] == 200
    assert begun == [3, 0]


def until(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return done


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(serve, stream):
    server = serve(lambda ids: 70, seconds=0.01)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    body = json.dumps(asking("x>", max_tokens=10_000, stream=stream))
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        response = connection.getresponse()
        assert response.read(10)
        response.close()
    assert until(lambda: server.scheduler.load[0] == 1)
    connection.close()
    assert until(lambda: server.scheduler.load == (0, 0))
    assert len(server.decoder.reads) < 2000


def test_one_bad_text_harms_no_other(serve):
    def script(ids: list[int]) -> int:
        if ids[0] == 70:
            raise RuntimeError("out of order")
        return 80 if len(ids) < 40 else 2

    server = serve(script, seconds=0.002)
    with ThreadPoolExecutor(4) as pool:
        prompts = [[70], [71], [72], [70, 5]]
        found = list(pool.map(lambda p: post(server.url, "/v1/completions", asking(p)), prompts))  # type: ignore[arg-type]
    assert [status for status, _, _ in found] == [500, 200, 200, 500]
    assert "RuntimeError" in found[0][1]["error"]["message"]
    assert "out of order" not in json.dumps(found[0][1])
    assert found[1][1]["choices"][0]["text"] == found[1][1]["choices"][0]["text"][0] * 39
    assert get(server.url, "/health")[0] == 200


def test_two_hundred_requests_of_eight_clients_some_cut_off(serve, tiny_tokenizer):
    """Each answer is its prompt four times over, so that a token of another text would show."""
    mark = tiny_tokenizer(">")["input_ids"][0]

    def script(ids: list[int]) -> int:
        prompt = ids[: ids.index(mark)]
        made = len(ids) - len(prompt) - 1
        return prompt[made % len(prompt)] if made < 4 * len(prompt) else 2

    server = serve(script, seconds=0.0005, limits=Limits(slots=6, queue=10))
    numbers, lock, problems, cut, busy = iter(range(200)), threading.Lock(), [], [], []

    def one(number: int, draw: random.Random) -> None:
        prompt = f"<{number}:{draw.randrange(10**6)}"
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
        stream = draw.random() < 0.6
        body = json.dumps(asking(prompt + ">", stream=stream))
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if stream and draw.random() < 0.3:
            with connection.getresponse() as response:
                response.read(draw.randrange(400))
            cut.append(number)
        else:
            response = connection.getresponse()
            data = response.read().decode()
            if response.status == 429:
                busy.append(number)
            elif stream:
                parts = [json.loads(p[6:]) for p in data.split("\n\n") if p and p != "data: [DONE]"]
                if "".join(p["choices"][0]["text"] for p in parts) != prompt * 4 or "[DONE]" not in data:
                    problems.append((number, data))
            elif json.loads(data)["choices"][0]["text"] != prompt * 4:
                problems.append((number, data))
        connection.close()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            one(number, draw)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    assert problems == []
    assert len(cut) > 10
    assert busy == []  # eight clients fit in six slots and a queue
    assert until(lambda: server.scheduler.load == (0, 0))
    assert len(server.decoder.open) <= 6  # those kept for texts that go on
    metrics = get(server.url, "/metrics")[1]
    assert 'paley_requests_total{path="/v1/completions",status="200"} 200.0' in metrics
    assert 'paley_running{model="scripted"} 0.0' in metrics


def test_a_long_prompt_does_not_hold_up_others(serve):
    server = serve(lambda ids: 70 if len(ids) < 1200 else 2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server.url, "/v1/completions", asking([5] * 1000 + [6], max_tokens=2))  # type: ignore[arg-type]
        second = pool.submit(post, server.url, "/v1/completions", asking([7], max_tokens=30))  # type: ignore[arg-type]
        assert (first.result()[0], second.result()[0]) == (200, 200)
    assert max(len(part) for read in server.decoder.reads for part in read) <= 256


def test_an_answer_that_takes_too_long_ends_with_an_error_when_the_server_stops(tiny_tokenizer):
    model, decoder = scripted_model(tiny_tokenizer, lambda ids: 70, seconds=0.01)
    app, got = create_app({"scripted": model}), []

    def ask() -> None:
        connection = http.client.HTTPConnection(f"127.0.0.1:{sock.getsockname()[1]}", timeout=30)
        body = json.dumps(asking("x>", max_tokens=10**6, stream=True))
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            response.read(10)
            os.kill(os.getpid(), signal.SIGTERM)
            got.append(response.read().decode())
        connection.close()

    thread = threading.Thread(target=ask)
    with listen("127.0.0.1", 0) as sock:
        run(app, sock, thread.start, patience=0.3)
    thread.join(10)
    last = [part for part in got[0].split("\n\n") if part][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
    assert decoder.open == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_the_server_cannot_listen_on():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PaleyError, match=f"127.0.0.1:{port}: the port is in use; choose another with port"):
            listen("127.0.0.1", port)
    with pytest.raises(PaleyError, match="cannot listen there"):
        listen("no.such.host.invalid", 0)
