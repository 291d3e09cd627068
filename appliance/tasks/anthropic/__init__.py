"""Anthropic's Messages: bodies to chats (`read`, `blocks`), replies to messages (`reply`), streams (`events`)."""
