"""HTTP on a unix socket: request models, OpenAI's shapes, label scoring."""
