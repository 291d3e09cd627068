"""What the node says of itself: `logs` (structlog), `metrics` (Prometheus) and `traces` (OpenTelemetry)."""
