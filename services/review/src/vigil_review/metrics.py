"""The review page's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

# result: shown, refused, away
PAGES = Counter("vigil_review_pages_total", "Pages by what became of them", ["result"])
ANNOTATIONS = Counter("vigil_review_annotations_total", "What people said here", ["label"])
SESSIONS = Gauge("vigil_review_sessions", "People logged in")
