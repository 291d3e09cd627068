"""The CPU engine: llama.cpp behind a batching scheduler and an OpenAI dialect, a program of its own.

    python -m appliance.llamacpp --model FILE.gguf --uds SOCKET

It imports nothing of the rest but `appliance.errors`, so it can be replaced, moved or killed alone.
"""
