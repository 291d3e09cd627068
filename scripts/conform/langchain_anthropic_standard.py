"""LangChain's standard tests for chat models with langchain-anthropic, in the environment of scripts/conformance."""

import os
from typing import Any

from langchain_anthropic import ChatAnthropic  # type: ignore[import-not-found]
from langchain_tests.integration_tests import ChatModelIntegrationTests  # type: ignore[import-not-found]
from langchain_tests.unit_tests import ChatModelUnitTests  # type: ignore[import-not-found]


class _About:
    """What is told of the model to both kinds of tests."""

    @property
    def chat_model_class(self) -> Any:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        base = os.environ["TEST_API_BASE_URL"]
        return {"model": "scripted", "base_url": base, "api_key": "none", "max_retries": 0}

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestUnit(_About, ChatModelUnitTests):  # type: ignore[misc]
    pass


class TestIntegration(_About, ChatModelIntegrationTests):  # type: ignore[misc]
    pass
