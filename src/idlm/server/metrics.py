"""Prometheus metrics of one server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from idlm.server.worker import Job, Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 30, 60, 120)
PER_TOKEN = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
REQUEST = (0.1, 0.3, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms, and gauges that ask the worker when they are read."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self._requests = Counter(
            "idlm_http_requests", "HTTP requests.", ("path", "status"), registry=r
        )
        self._seconds = Histogram(
            "idlm_http_request_seconds", "Until the end.", ("path",), buckets=REQUEST, registry=r
        )
        self._texts = Counter(
            "idlm_texts",
            "Texts (choices of requests) that ended, by reason.",
            ("finish_reason",),
            registry=r,
        )
        self._prompt_tokens = Counter("idlm_prompt_tokens", "Tokens of prompts.", registry=r)
        self._tokens = Counter(
            "idlm_generated_tokens",
            "Tokens given out.",
            ("layout", "stride", "verification"),
            registry=r,
        )
        self._forwards = Counter(
            "idlm_forwards",
            "Forward passes, per text, by what became of the drafts: all stood (verify), one "
            "fell (reject), there were none (cold).",
            ("layout", "stride", "verification", "outcome"),
            registry=r,
        )
        self._reached = Counter(
            "idlm_drafts_reached",
            "Drafts tested with all before them standing, by place in the block.",
            ("stride", "place"),
            registry=r,
        )
        self._accepted = Counter(
            "idlm_drafts_accepted", "Drafts that stood.", ("stride", "place"), registry=r
        )
        self._prefix_queries = Counter(
            "idlm_prefix_cache_queries", "Tokens of prompts that were looked up.", registry=r
        )
        self._prefix_hits = Counter(
            "idlm_prefix_cache_hits", "Those whose keys and values were there.", registry=r
        )
        self._preemptions = Counter(
            "idlm_num_preemptions",
            "Times that a text had to leave because the KV cache was full.",
            registry=r,
        )
        self._first_token = Histogram(
            "idlm_time_to_first_token_seconds",
            "From the queue to the first token.",
            buckets=FIRST_TOKEN,
            registry=r,
        )
        self._per_token = Histogram(
            "idlm_time_per_output_token_seconds",
            "Mean of a text after its first token.",
            buckets=PER_TOKEN,
            registry=r,
        )

    def watch(self, load: Callable[[], Load], step_failures: Callable[[], int]) -> None:
        """Add the gauges of a worker."""
        self._registry.register(_Gauges(load, step_failures))

    def http(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request that ended; ``path`` is that of a route."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def job(self, job: Job) -> None:
        """Count a job that ended."""
        request = job.request
        reason = "error" if job.error else "abort"
        if job.error is None and request is not None and request.finish_reason is not None:
            reason = request.finish_reason.value
        self._texts.labels(reason).inc()
        if request is None:
            return
        self._prompt_tokens.inc(len(job.prompt_token_ids))
        if request.started:
            self._prefix_queries.inc(len(job.prompt_token_ids))
            self._prefix_hits.inc(request.prefix_hit_tokens)
            self._preemptions.inc(request.preemptions)
        method = (job.method.layout, str(job.method.stride), job.method.verification)
        stats, tokens = request.stats, len(request.token_ids)
        self._tokens.labels(*method).inc(tokens)
        for outcome in ("verify", "reject", "cold"):
            self._forwards.labels(*method, outcome).inc(getattr(stats, outcome))
        for place, count in stats.reached_at.items():
            self._reached.labels(job.method.stride, place).inc(count)
            self._accepted.labels(job.method.stride, place).inc(stats.accepted_at[place])
        if job.first_token:
            self._first_token.observe(job.first_token - job.submitted)
            if tokens > 1:
                seconds = job.ended - job.first_token
                self._per_token.observe(seconds / (tokens - 1))

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What the worker says of itself, read once for each scrape."""

    def __init__(self, load: Callable[[], Load], step_failures: Callable[[], int]) -> None:
        self._load, self._step_failures = load, step_failures

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        values = {
            "running_texts": ("Texts that are being generated.", load.running),
            "waiting_texts": ("Texts in the queue.", load.waiting),
            "kv_cache_tokens": ("Tokens of the blocks that running texts hold.", load.kv_tokens),
            "kv_cache_capacity_tokens": (
                "Tokens that the memory set aside for keys and values holds.",
                load.kv_capacity,
            ),
            "step_failures": ("Steps that failed since the start.", self._step_failures()),
        }
        for name, (meaning, value) in values.items():
            yield GaugeMetricFamily(f"idlm_{name}", meaning, value)
        yield CounterMetricFamily(
            "idlm_kv_cache_evictions",
            "Blocks of texts that had ended, given to others.",
            load.kv_evictions,
        )
        plans = CounterMetricFamily(
            "idlm_auto_forwards",
            "Forward passes of batches, by the layout and stride chosen for them.",
            labels=("layout", "stride"),
        )
        for plan, count in load.plans.items():
            plans.add_metric(plan.split(":"), count)
        yield plans
