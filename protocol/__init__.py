"""The wire, between device and server, and the bundle, between exporter and device. Imports no other dlora package."""
