"""An HTTP server on the device that speaks OpenAI's API."""
