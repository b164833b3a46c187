"""The app proxy: forwards authenticated traffic to healthy replicas, by the route table."""
