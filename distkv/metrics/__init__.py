"""What an engine tells of itself, to those who watch it: Prometheus, Grafana, Ray, a terminal, a trace viewer."""
