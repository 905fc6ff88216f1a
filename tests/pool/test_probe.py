"""What the pool refuses at its start, and what it shows and trusts: keys, TLS, proxies."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from agentcpm_jax.engine.server import ServerKeys
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.pool.config import Keys, PoolConfig
from agentcpm_jax.pool.servers import SGLangPool
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.types import UserError
from tests.doubles.fault_server import Fault, FaultServer, ToyEngine
from tests.doubles.toy_pool import (
    QUICK,
    check_toy,
    open_pool,
    request,
    sample_all,
    toy_trainer,
    toy_weights,
    wait_for,
)

# --- start-up -------------------------------------------------------------------------------


def test_an_unreachable_pool_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no worker of the pool.*127.0.0.1:9.*unreachable") as e:
        open_pool(["http://127.0.0.1:9"], tmp_path, start_timeout=0.2)
    assert "\n" not in str(e.value)


def test_one_reachable_worker_is_enough_to_start(servers, tmp_path):
    pool = open_pool(["http://127.0.0.1:9", servers.start(FaultServer())], tmp_path)
    (done,) = sample_all(pool, [request()])
    pool.close()
    check_toy(request(), done, {0: "w0"})


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (toy_trainer("other"), "version mismatch: .* nats from the trainer's"),
        (replace(toy_trainer("w0"), vocab_size=98), "input_ids holds 97; the vocabulary has 97"),
        (replace(toy_trainer("w0"), vocab_size=40), "vocabulary: .*sampled id"),
    ],
)
def test_a_server_that_is_not_the_trainers_is_refused(servers, tmp_path, trainer, message):
    cfg = replace(QUICK, urls=(servers.start(FaultServer()),), start_timeout=0.3)
    pool = SGLangPool(cfg, "run")
    with pytest.raises(UserError, match=message):
        pool.start(trainer, 0, toy_weights(tmp_path, "w0"))
    pool.close()


def test_a_model_that_does_not_take_the_weights_is_the_wrong_model(servers, tmp_path):
    cfg = replace(QUICK, urls=(servers.start(FaultServer()),))
    pool = SGLangPool(cfg, "run")
    with pytest.raises(UserError, match=r"wrong model on http.*toy.txt is missing"):
        pool.start(toy_trainer("w0"), 0, str(tmp_path / "nothing"))
    pool.close()


def test_a_server_that_dies_of_the_first_weights_is_the_wrong_model(servers, tmp_path):
    toy = FaultServer()
    toy.arm(Fault("death", "/update_weights_from_disk"))
    with pytest.raises(UserError, match=r"wrong model on http.*ended while it loaded") as error:
        open_pool([servers.start(toy)], tmp_path)
    assert "\n" not in str(error.value) and not toy.sessions.paused


def test_a_server_that_dies_of_the_first_weights_of_others_is_waited_for(servers, tmp_path):
    """It was killed, and is started again: another one took these weights."""
    toy = FaultServer()
    toy.arm(Fault("death", "/update_weights_from_disk"))
    urls = [servers.start(toy), servers.start(FaultServer())]
    pool = open_pool(urls, tmp_path)
    wait_for(lambda: set(pool.workers().values()) == {"ready"})
    pool.close()
    assert toy.sessions.version == "run-000000"


def test_another_architecture_is_refused_before_it_is_given_weights(servers, tmp_path):
    toy = FaultServer(model={"architectures": ["LlamaForCausalLM"], "model_path": "org/name"})
    config = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64}
    pool = SGLangPool(replace(QUICK, urls=(servers.start(toy),)), "run")
    message = r"wrong model on http.*org/name has architectures \['Llama.*the run's model \['Qwen3"
    with pytest.raises(UserError, match=message):
        pool.start(replace(toy_trainer("w0"), config=config), 0, toy_weights(tmp_path, "w0"))
    pool.close()
    assert (toy.sessions.version, toy.sessions.total["requests"]) == ("default", 0)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("chat_template.jinja", "content + '<", "content + ' <", "chat template mismatch: "),
        ("tokenizer.json", '"<0x2E>": 46', '"<0x2E>": 45', "vocabulary mismatch: .*'Answer from"),
    ],
)
def test_another_template_or_tokenizer_is_refused(servers, tmp_path, file, old, new, message):
    """The trainer's files differ from the server's by a character."""
    own = tmp_path / "own"
    shutil.copytree(SHIPPED["shipped:sft"], own)
    text = (own / file).read_text()
    assert old in text
    (own / file).write_text(text.replace(old, new))
    url = servers.start(FaultServer(ToyEngine(544), chat=load_chat(SHIPPED["shipped:sft"])))
    pool = SGLangPool(replace(QUICK, urls=(url,)), "run")
    with pytest.raises(UserError, match=message) as error:
        pool.start(
            replace(toy_trainer("w0", 544), chat=load_chat(own)),
            0,
            toy_weights(tmp_path, "w0"),
        )
    pool.close()
    assert "\n" not in str(error.value)


class Tempered(ToyEngine):
    """Reports log-probabilities of softmax(logits / T), as SGLang does by default."""

    async def sample(self, request: SampleRequest) -> Completion:
        done = await super().sample(request)
        return replace(done, logprobs=done.logprobs / (request.params.temperature or 1.0))


def test_the_temperature_convention_is_found_and_a_mismatch_refused(servers, tmp_path):
    url = servers.start(FaultServer(Tempered()))
    cfg, path = replace(QUICK, urls=(url,)), toy_weights(tmp_path, "w0")
    pool = SGLangPool(cfg, "run")
    hot = replace(toy_trainer("w0"), temperature=0.7)
    with pytest.raises(UserError, match=r"log-prob convention.*after the temperature.*=1"):
        pool.start(hot, 0, path)
    pool.close()
    open_pool([url], tmp_path).close()  # at temperature 1 the two conventions are one
    raw = servers.start(FaultServer())
    pool = SGLangPool(replace(cfg, urls=(raw,)), "run")
    pool.start(hot, 0, path)
    pool.close()


def test_a_prompt_beyond_the_context_is_refused_and_not_repeated(servers, tmp_path):
    toy = FaultServer(ToyEngine(capacity=64))
    pool = open_pool([servers.start(toy)], tmp_path)
    before = toy.sessions.total["requests"]
    long, fits = request(prompt=range(70)), request(prompt=range(50))
    refused, cut = sample_all(pool, [long, fits])
    pool.close()
    assert refused.finish is Finish.ERROR
    assert "71 tokens leaves no room in a context of 64" in refused.error
    assert (cut.finish, len(cut.ids)) == (Finish.LENGTH, 13)
    assert toy.sessions.total["requests"] == before + 1


# --- keys, TLS, proxies ---------------------------------------------------------------------


def test_keys_come_from_the_environment_and_are_never_shown(servers, tmp_path, monkeypatch):
    toy = FaultServer(keys=ServerKeys("ordinary-secret", "admin-secret"))
    url = servers.start(toy)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    monkeypatch.delenv("SGLANG_ADMIN_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"forbidden.*set SGLANG_API_KEY and SGLANG_ADMIN_API_KEY"):
        open_pool([url], tmp_path)
    monkeypatch.setenv("SGLANG_API_KEY", "ordinary-secret")
    with pytest.raises(UserError, match="forbidden") as error:
        open_pool([url], tmp_path)  # the ordinary key does not control
    monkeypatch.setenv("SGLANG_ADMIN_API_KEY", "admin-secret")
    pool = open_pool([url], tmp_path)
    (done,) = sample_all(pool, [request()])
    shown = repr(vars(pool)) + repr(pool.workers()) + str(error.value) + repr(pool.cfg)
    pool.close()
    check_toy(request(), done, {0: "w0"})
    assert "secret" not in shown
    assert "secret" not in repr(Keys("a-secret", "b-secret")) + repr(ServerKeys("a-secret"))


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://a", "http://", "http://u:pw@host:1"])
def test_a_url_that_is_none_or_holds_a_password_is_refused(url):
    with pytest.raises(UserError) as error:
        SGLangPool(PoolConfig(urls=(url,)), "run")
    assert "pw" not in str(error.value)


def test_a_private_authority_is_trusted_only_when_named(tmp_path, servers, monkeypatch):
    import ssl
    import subprocess

    from aiohttp import web

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    name = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    command = [*make.split(), *name.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def listen() -> tuple[web.AppRunner, str]:
        runner = web.AppRunner(FaultServer().application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        return runner, f"https://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = servers.call(listen())
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
        open_pool([url], tmp_path, start_timeout=0.2)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    pool = open_pool([url], tmp_path)
    (done,) = sample_all(pool, [request()])
    pool.close()
    servers.call(runner.cleanup())
    check_toy(request(), done, {0: "w0"})


def test_a_proxy_named_by_the_environment_is_used(servers, tmp_path, monkeypatch):
    import httpx
    from aiohttp import web

    url, asked = servers.start(FaultServer()), []

    async def forward(incoming: web.Request) -> web.Response:
        asked.append(incoming.path)
        async with httpx.AsyncClient(trust_env=False) as client:
            target = f"{url}{incoming.path_qs}"
            answer = await client.request(
                incoming.method,
                target,
                content=await incoming.read(),
                headers={"Content-Type": "application/json"},
            )
        return web.Response(status=answer.status_code, body=answer.content)

    async def listen() -> tuple[web.AppRunner, int]:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    runner, port = servers.call(listen())
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    pool = open_pool(["http://workers.invalid:30000"], tmp_path)
    (done,) = sample_all(pool, [request()])
    pool.close()
    servers.call(runner.cleanup())
    check_toy(request(), done, {0: "w0"})
    assert "/generate" in asked and "/update_weights_from_disk" in asked
