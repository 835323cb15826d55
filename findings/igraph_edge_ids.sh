#!/usr/bin/env bash
# python-igraph 1.0.0 gives the edges of a GraphML file the ids of its nodes.
#
# Versions: igraph 1.0.0, against igraph 0.11.9; Python 3.11, Linux.
# Expected: `Graph.Read_GraphML` puts an edge's XML attribute `id` into the edge attribute "id", as it
#   does for nodes and as igraph 0.11.9 does.
# Seen: with 1.0.0 the edge attribute "id" of the i-th edge is the id of the i-th node, and empty from
#   the edge on for which there is no such node; in whatever order the XML attributes are. Nothing is
#   said; edges, nodes and all other attributes are right. So edges that are looked up, or joined to
#   other data, by their id are taken for others, and what is written back has lost the ids.
# Way round: write the id a second time as an attribute of another name (<key for="edge" ...>).
#
# Installs into a temporary folder, and fails when igraph behaves otherwise than said here.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/graph.graphml" <<'XML'
<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
  <key id="d0" for="edge" attr.name="name" attr.type="string"/>
  <graph id="G" edgedefault="directed">
    <node id="n0"/>
    <node id="n1"/>
    <edge id="e0" source="n0" target="n1"><data key="d0">e0</data></edge>
    <edge id="e1" source="n0" target="n1"><data key="d0">e1</data></edge>
    <edge source="n1" id="e2" target="n0"><data key="d0">e2</data></edge>
    <edge source="n1" target="n1" id="e3"><data key="d0">e3</data></edge>
  </graph>
</graphml>
XML

cat > "$folder/read.py" <<'PY'
import sys

import igraph

graph = igraph.Graph.Read_GraphML(sys.argv[1])
ids, names = graph.es["id"], graph.es["name"]
print(f"igraph {igraph.__version__}: nodes {graph.vs['id']}, edge ids {ids}, names {names}")
assert graph.vs["id"] == ["n0", "n1"] and names == ["e0", "e1", "e2", "e3"]
assert ids == sys.argv[2].split(","), f"expected {sys.argv[2]}"
PY

for case in "0.11.9 e0,e1,e2,e3" "1.0.0 n0,n1,,"; do
    read -r version ids <<< "$case"
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "igraph==$version"
    "$folder/$version/bin/python" "$folder/read.py" "$folder/graph.graphml" "$ids"
done
echo "as described: igraph 1.0.0 reads the ids of nodes where those of edges should be"
