"""The way from text and chats to requests, and from tokens to answers."""
