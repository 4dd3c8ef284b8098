"""The inference engine, its HTTP front and the client. The engine knows neither HTTP nor Ray."""
