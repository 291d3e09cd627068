"""OpenAI's Responses: bodies to chats (`read`, `items`), replies to responses (`reply`), streams (`events`)."""
