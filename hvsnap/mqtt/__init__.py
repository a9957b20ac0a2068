"""Publishing what happens over MQTT, and nothing else: hvsnap subscribes to no topic (docs/mqtt.md)."""
