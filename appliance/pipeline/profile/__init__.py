"""What a request is, before any model is called: task, complexity, format, language, length."""

from appliance.pipeline.profile.rules import profile

__all__ = ["profile"]
