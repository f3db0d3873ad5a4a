"""The HTTP endpoint: a Ray Serve application that draws with a promoted release, behind OpenAI's images API."""
