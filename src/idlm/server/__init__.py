"""An OpenAI-compatible HTTP server over one engine thread, and a page that shows it at work."""
