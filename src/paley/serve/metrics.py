"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from paley.serve.scheduler import Job, Scheduler

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Of one application, in a registry of its own."""

    def __init__(self, schedulers: Mapping[str, Scheduler]):
        self._registry = CollectorRegistry()
        labels = ["model"]
        self.requests = Counter("paley_requests", "Requests answered.", ["path", "status"], registry=self._registry)
        self._prompt = Counter("paley_prompt_tokens", "Tokens of prompts.", labels, registry=self._registry)
        self._cached = Counter(
            "paley_cached_prompt_tokens",
            "Tokens of prompts that a cache held already.",
            labels,
            registry=self._registry,
        )
        self._made = Counter("paley_generated_tokens", "Tokens drawn.", labels, registry=self._registry)
        self._first = Histogram(
            "paley_time_to_first_token_seconds", "From the request to the first token.", labels, buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._rate = Histogram(
            "paley_tokens_per_second", "Of one answer, after its first token.", labels, buckets=_RATES,
            registry=self._registry,
        )  # fmt: skip
        running = Gauge("paley_running", "Answers that are being written.", labels, registry=self._registry)
        waiting = Gauge("paley_waiting", "Answers that wait for a slot.", labels, registry=self._registry)
        cache = Gauge("paley_kv_cache_bytes", "Bytes of all caches.", labels, registry=self._registry)
        for name, scheduler in schedulers.items():
            running.labels(name).set_function(lambda s=scheduler: s.load[0])
            waiting.labels(name).set_function(lambda s=scheduler: s.load[1])
            cache.labels(name).set_function(lambda s=scheduler: s.kv_cache_bytes)

    def count(self, model: str, job: Job) -> None:
        """A job that has ended, or was cut off."""
        if job.first is None or job.last is None:
            return
        self._prompt.labels(model).inc(len(job.prompt))
        self._cached.labels(model).inc(job.cached_tokens)
        self._made.labels(model).inc(job.made_tokens)
        self._first.labels(model).observe(job.first - job.submitted)
        if job.made_tokens > 1 and job.last > job.first:
            self._rate.labels(model).observe((job.made_tokens - 1) / (job.last - job.first))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
