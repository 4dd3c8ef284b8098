import pytest

from ray_ds.config.serve import ServeSettings
from ray_ds.config.settings import decode_settings, digest_settings, field_docs
from ray_ds.errors import ConfigError


def decode(**raw: object) -> ServeSettings:
    return decode_settings(ServeSettings, raw, where="serve")


def test_defaults_are_safe_and_every_field_is_explained() -> None:
    settings = decode()
    assert settings.host == "127.0.0.1"
    assert (settings.autoscaling.min_replicas, settings.autoscaling.max_replicas) == (1, 2)
    docs = field_docs(ServeSettings)
    assert [name for name, text in docs.items() if not text and name != "autoscaling"] == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"autoscaling": {"min_replicas": 3}}, r"autoscaling.max_replicas \(2\) must be at least min_replicas \(3\)"),
        (
            {"autoscaling": {"max_replicas": 1, "upscale_delay_s": 5.0}},
            r"upscale_delay_s \(5.0\) has no effect while min_replicas = max_replicas = 1; remove it",
        ),
        (
            {"autoscaling": {"max_replicas": 1, "policy": "tokens"}},
            r"policy \(tokens\) has no effect while min_replicas = max_replicas = 1; remove it",
        ),
        (
            {"autoscaling": {"target_ongoing_requests": 2.0}},
            r"target_ongoing_requests \(2.0\) has no effect unless policy is ongoing_requests; remove it",
        ),
        (
            {"autoscaling": {"policy": "ongoing_requests", "target_ttft_s": 2.0}},
            r"target_ttft_s \(2.0\) has no effect unless policy is tokens; remove it",
        ),
        (
            {"autoscaling": {"downscale_to_zero_delay_s": 2.0}},
            r"downscale_to_zero_delay_s \(2.0\) has no effect unless min_replicas is 0; remove it",
        ),
        ({"autoscaling": {"hysteresis": 1.0}}, r"serve.autoscaling.hysteresis \(1.0\) must be less than 1"),
        (
            {"host": "0.0.0.0"},
            r"serve.host \(0.0.0.0\) must be 127.0.0.1 while there is no api_key_env.*set api_key_env",
        ),
        (
            {"cache_tokens": 100, "max_model_len": 128},
            r"serve.cache_tokens \(100\) must be at least max_model_len \(128\).*; raise it, or lower max_model_len",
        ),
        ({"cache_block_tokens": 20}, r"serve.cache_block_tokens \(20\) must be 16, 32 or 64"),
        ({"exactness": "all"}, r"serve.exactness \(all\) must be 'none', 'batch' or 'schedule'"),
        (
            {"api_keys_file": "/k.toml"},
            r"serve.api_keys_file \(/k.toml\) must come with api_key_env.*; set api_key_env",
        ),
        ({"api_keys_file": "k.toml", "api_key_env": "K"}, r"serve.api_keys_file \(k.toml\) must"),
        ({"grpc_port": 9000}, r"serve.grpc_port \(9000\) must be absent with host 127.0.0.1.*on all addresses"),
        ({"ingress": "haproxy"}, r"serve.ingress \(haproxy\) must be proxy with host 127.0.0.1.*8404 and 9101"),
        ({"tls_cert_file": "/c.pem"}, r"serve.tls_key_file \(missing\) must be given with its other half"),
        ({"tls_key_file": "/k.pem"}, r"serve.tls_cert_file \(missing\) must be given with its other half"),
        (
            {"host": "::", "api_key_env": "K", "ingress": "haproxy", "tls_cert_file": "/c", "tls_key_file": "/k"},
            r"serve.tls_cert_file \(/c\) must be absent with ingress haproxy.*ray#64260\); end TLS in front of it",
        ),
        (
            {"safety": {"harm": "block"}},
            r"serve.safety.harm \(block\) has no effect while safety.scope is off; remove it",
        ),
        ({"safety": {"detector": "a:b"}}, r"detector \(a:b\) has no effect while safety.scope is off; remove it"),
        (
            {"safety": {"scope": "output", "jailbreak": "block"}},
            r"jailbreak \(block\) has no effect while safety.scope is output: only prompts are looked at for it",
        ),
        (
            {"safety": {"scope": "input", "secret": "redact"}},
            r"secret \(redact\) has no effect while safety.scope is input: prompts are refused or left as they are",
        ),
        ({"request_timeout_s": 0}, r"serve.request_timeout_s \(0\) must be greater than 0"),
        ({"port": 70000}, r"serve.port \(70000\) must be less than or equal to 65535"),
        ({"port": "8000"}, r"serve.port \(8000\) must be a valid integer"),
        ({"route_prefix": "v1/"}, r"serve.route_prefix \(v1/\) must"),
        ({"model_id": "a b"}, r"serve.model_id \(a b\) must"),
        ({"max_running_requests": 0}, r"serve.max_running_requests \(0\) must be greater than or equal to 1"),
        ({"precision": "fp16"}, r"serve.precision \(fp16\) must be 'fp32' or 'bf16'"),
        ({"replicas": 2}, r"serve.replicas \(2\) must be one of the known settings: model_id, app_name"),
    ],
)
def test_wrong_settings_are_refused(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(**raw)


def test_only_what_does_not_change_the_endpoint_is_left_out_of_its_digest() -> None:
    digested = digest_settings(decode())
    assert isinstance(digested, dict)
    assert set(vars(decode())) - set(digested) == {"deploy_timeout_s", "question"}


def test_an_open_address_with_a_key_is_allowed() -> None:
    assert decode(host="0.0.0.0", api_key_env="TEAM_KEY").host == "0.0.0.0"


def test_answers_are_exact_on_a_cpu_and_fast_on_a_gpu_unless_told_otherwise() -> None:
    assert decode().exactness == "schedule"
    assert decode(gpus_per_replica=1.0).exactness == "none"
    assert decode(gpus_per_replica=1.0, exactness="batch").exactness == "batch"


def test_the_safety_filter_is_on_where_strangers_can_reach_the_endpoint() -> None:
    opened, closed = decode(host="0.0.0.0", api_key_env="TEAM_KEY").safety, decode().safety
    assert (opened.scope, opened.secret, opened.contact, opened.harm) == ("both", "redact", "allow", "block")
    assert (closed.scope, closed.secret) == ("off", None)
    chosen = decode(host="0.0.0.0", api_key_env="TEAM_KEY", safety={"scope": "off"}).safety
    assert chosen.scope == "off" and chosen.harm is None
