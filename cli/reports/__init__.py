"""Tables and plots of many results: read, averaged over seeds and unseen domains, written."""
