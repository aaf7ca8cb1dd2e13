"""What an engine has learned, whole: saved under one engine, gone on with under another."""
