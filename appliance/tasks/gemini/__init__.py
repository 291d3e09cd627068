"""Gemini's generateContent: bodies to chats (`read`, `contents`), replies and streams (`reply`)."""
