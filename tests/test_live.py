"""A run that is watched: what the server gives away, and what is printed."""

import base64
import hashlib
import http.client
import json
import re
import subprocess
import sys
import threading

import pytest

from mstar_jax.report import live, markup, page

RECORD = {"iteration": 0, "split": "validation", "greedy_accuracy": 0.25, "pass_at_k": 0.5, "seconds": 1800}


def write(workdir, *stages, iterations=1):
    workdir.mkdir(exist_ok=True)
    results = {"config": {"evolve": {"iterations": iterations}}, "stages": stages}
    (workdir / "results.json").write_text(json.dumps(results))


@pytest.fixture
def server():
    found = live.Server(0)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_only_the_page_is_served(server):
    server.page, server.at = "<p>é</p>", "1"
    status, text, headers = ask(server, "/")
    assert (status, text, headers["Content-Type"]) == (200, "<p>é</p>", "text/html; charset=utf-8")
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    assert ask(server, "/version")[:2] == (200, "1")
    for path in ("/results.json", "/../config.json", "//etc/passwd", "/report/", "/?x"):
        assert ask(server, path)[0] == 404, path
    assert ask(server, "/", "POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "evil.example:{}", "127.0.0.1:{}.evil.example", ""]
)
def test_another_host_is_refused(server, host):
    server.page = "secret"
    status, text, _ = ask(server, "/", Host=host.format(server.server_port))
    assert status == 421 and "secret" not in text
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_the_page_may_only_reload_itself(tmp_path):
    """The policy allows both scripts by their digests and this server; what a model wrote stays text."""
    page = markup.Page(tmp_path, several=False)
    page.section("a", "A", lambda: "script-src &lt;/body&gt;")
    text = live.live(page.html("t"), "12-3")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    [own, added] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert "report" in own or "samples-data" in own
    assert '"12-3"' in added and text.endswith("</script></body>\n</html>\n")
    parts = [part.split() for part in policy.split(";")]
    assert {part[0]: len(part) - 1 for part in parts} == {
        "default-src": 1, "img-src": 1, "style-src": 1, "connect-src": 1, "script-src": 2,
    }  # fmt: skip

    for script in (own, added):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy


def test_the_page_comes_with_the_first_stage_and_with_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "EVERY", 0.02)
    made, workdir, page = [], tmp_path / "run", tmp_path / "report.html"

    def make():
        made.append(len(json.loads((workdir / "results.json").read_text())["stages"]))
        page.write_text(f"<p>{made[-1]} stages</p></body>")
        if len(made) == 3:
            raise KeyboardInterrupt
        return page

    servers = []
    monkeypatch.setattr(
        live, "Server", lambda port, real=live.Server: servers.append(real(port)) or servers[0]
    )

    def run():
        shown = lambda text: next(  # noqa: E731
            x
            for x in iter(lambda: ask(servers[0], "/")[1] if servers and servers[0].page else "", None)
            if text in x
        )
        shown("No stage has ended yet")
        first = ask(servers[0], "/version")[1]
        write(workdir, RECORD | {"stage": "base"})
        shown("1 stages")
        assert ask(servers[0], "/version")[1] != first
        write(workdir, RECORD | {"stage": "base"}, RECORD | {"stage": "warmup"})
        shown("2 stages")
        write(workdir)
        done.append(True)

    done = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        live.watch([workdir], make, 0, follow=False)
    thread.join()
    servers[0].shutdown()
    servers[0].server_close()
    assert done and made == [1, 2, 0]
    assert re.fullmatch(r"http://127.0.0.1:\d+/ .*\n", capsys.readouterr().out)


def test_stages_are_printed_once_until_the_end(tmp_path, monkeypatch, capsys):
    base, warmup = RECORD | {"stage": "base", "kept": None}, RECORD | {"stage": "warmup", "kept": 7}
    last = RECORD | {"stage": "iteration", "iteration": 1}
    looks = [[base], [base], [base, warmup], [base, warmup | {"chosen": 0.7}], [base, warmup, last]]
    looks.append([base, warmup | {"chosen": 0.7}, last, last | {"split": "test"}])
    write(tmp_path, *looks.pop(0))
    monkeypatch.setattr(live.time, "sleep", lambda _: write(tmp_path, *looks.pop(0)))
    live.watch([tmp_path], lambda: tmp_path, None, follow=True)
    assert capsys.readouterr().out.splitlines() == [
        "base, validation: greedy 25.0%, pass@k 50.0%; 0.50 h so far",
        "warmup, validation: greedy 25.0%, pass@k 50.0%, trained on 7 responses; 1.00 h so far",
        "warmup: temperature 0.7 from here on; 1.00 h so far",
        "iteration 1, validation: greedy 25.0%, pass@k 50.0%; 1.50 h so far",
        "iteration 1, test: greedy 25.0%, pass@k 50.0%; 2.00 h so far",
    ]


def test_planned_hours_are_shown_beside_those_spent(tmp_path):
    last = RECORD | {"stage": "iteration", "iteration": 1}
    write(tmp_path, RECORD | {"stage": "base"}, RECORD | {"stage": "prm"}, last)
    parts = {"base": 0.25, "warm-up and reward model": 2, "iterations": 9.75}
    plan = {"on": "8 x <H100>", "hours": parts, "left_out": "compilation"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    ends = [line.split("; ")[1] for line in live.ended([tmp_path], set())]
    assert ends == [
        "0.50 h so far of 12.00 h planned (base 0.50 of 0.25)",
        "1.00 h so far of 12.00 h planned (warm-up and reward model 0.50 of 2.00)",
        "1.50 h so far of 12.00 h planned (iterations 0.50 of 9.75)",
    ]
    text = page.write([tmp_path]).read_text()
    assert "Planned: for 8 x &lt;H100&gt;, without compilation." in text
    assert '<th scope="row">all</th><td>12.00</td><td>1.50</td>' in text
    for odd in (
        "[]",
        "{",
        json.dumps(plan | {"hours": {}}),
        json.dumps(plan | {"hours": parts | {"base": -1}}),
        json.dumps(plan | {"hours": parts | {"base": 10**400}}),
    ):
        (tmp_path / "plan.json").write_text(odd)
        assert [line.split("; ")[1] for line in live.ended([tmp_path], set())][0] == "0.50 h so far"
        assert "Left out: plan.json is not what plan --out writes" in page.write([tmp_path]).read_text()
    (tmp_path / "plan.json").unlink()
    assert "Hours planned" not in page.write([tmp_path]).read_text()


def test_a_port_that_is_taken_is_named(server, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mstar_jax.report",
        str(tmp_path),
        "--serve",
        f"--port={server.server_port}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Address already in use" in done.stderr and "Traceback" not in done.stderr
