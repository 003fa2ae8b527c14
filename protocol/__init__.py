"""The two contracts that the device and the server share: the wire and the bundle. Knows neither."""
