import httpx
from prometheus_client.parser import text_string_to_metric_families

from ray_ds import __version__

NAMES = {
    "vllm:num_requests_running": 3,
    "vllm:num_requests_waiting": 2,
    "vllm:kv_cache_usage_perc": 48 / 64,
    "vllm:prompt_tokens_total": 400,
    "vllm:generation_tokens_total": 50,
    "vllm:prefix_cache_queries_total": 400,
    "vllm:prefix_cache_hits_total": 100,
    "vllm:num_preemptions_total": 4,
}


def scrape(client: httpx.Client) -> dict[tuple[str, ...], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    assert all(sample.labels["model_name"] == "team/tiny" for sample in samples)
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model_name")): sample.value
        for sample in samples
    }


def test_metrics_have_vllms_names_and_the_engines_figures(taught) -> None:
    found = scrape(taught)
    assert {name: found[name,] for name in NAMES} == NAMES


def test_metrics_time_and_count_requests(taught) -> None:
    taught.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 5})
    taught.post("/v1/embeddings", json={"input": "a"})
    found = scrape(taught)
    assert found["vllm:request_success_total", "length"] == 2 and found["vllm:request_success_total", "stop"] == 1
    assert found["vllm:time_to_first_token_seconds_count",] == 2
    assert found["vllm:inter_token_latency_seconds_count",] == 2 * 4
    assert found["vllm:e2e_request_latency_seconds_count",] == 3
    assert 0 < found["vllm:time_to_first_token_seconds_sum",] < found["vllm:e2e_request_latency_seconds_sum",]
    assert found["vllm:time_to_first_token_seconds_bucket", "+Inf"] == 2


def test_a_client_that_leaves_counts_as_aborted(url, model, api_key) -> None:
    model.gate.clear()
    headers = {"Authorization": f"Bearer {api_key}"}
    body = {"prompt": "a", "max_tokens": 200, "stream": True}
    with httpx.Client(base_url=url, headers=headers) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
        model.gate.set()
        while ("vllm:request_success_total", "abort") not in (found := scrape(client)):
            pass
    assert found["vllm:request_success_total", "abort"] == 1


def test_predict_and_version(taught, url, api_key, teacher) -> None:
    found = taught.post("/predict", json={"text": "Go", "max_tokens": 3}).json()
    chat = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 3}
    (choice,) = taught.post("/v1/chat/completions", json=chat).json()["choices"]
    assert found == {"prediction": choice["message"]["content"]}
    assert teacher.asked[0].params.temperature == 0
    headers = {"Authorization": f"Bearer {api_key}"}
    plain = httpx.post(f"{url}/predict", json={"text": "Go", "max_tokens": 3}, headers=headers).json()
    body = {"prompt": "Go", "max_tokens": 3, "temperature": 0}
    whole = httpx.post(f"{url}/v1/completions", json=body, headers=headers).json()
    assert plain == {"prediction": whole["choices"][0]["text"]}
    assert taught.get("/version").json() == {"version": __version__}
    assert taught.get("/ping").json() == taught.get("/health").json()
