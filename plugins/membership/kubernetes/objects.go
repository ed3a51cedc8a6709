package kubernetes

import (
	"encoding/json"
	"errors"
	"net/netip"
	"time"

	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
)

// The parts of the API's objects that matter (the API's reference, core/v1 Pod
// and discovery.k8s.io/v1 EndpointSlice). All else is skipped.

type meta struct {
	Name              string    `json:"name"`
	UID               string    `json:"uid"`
	ResourceVersion   string    `json:"resourceVersion"`
	CreationTimestamp time.Time `json:"creationTimestamp"`
}

type pod struct {
	Metadata meta `json:"metadata"`
	Status   struct {
		Phase string `json:"phase"`
		PodIP string `json:"podIP"`
	} `json:"status"`
}

type slice struct {
	Metadata  meta       `json:"metadata"`
	Endpoints []endpoint `json:"endpoints"`
}

type endpoint struct {
	Addresses []string `json:"addresses"`
	TargetRef *struct {
		UID string `json:"uid"`
	} `json:"targetRef"`
}

// list is one page of a list.
type list struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
		Continue        string `json:"continue"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
}

// event is one line of a watch.
type event struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"`
}

// status is what the API says of a failure.
type status struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// maxEndpoints bounds the endpoints of one slice; the API allows 1000.
const maxEndpoints = 4096

var errObject = errors.New("an object without name or version")

// podPeers reads a pod. One that is not running, or has no address yet, has no
// peers.
func podPeers(b []byte) (meta, []discovery.Peer, error) {
	var p pod
	if err := json.Unmarshal(b, &p); err != nil {
		return meta{}, nil, err
	}
	if p.Metadata.Name == "" {
		return meta{}, nil, errObject
	}
	ip, err := netip.ParseAddr(p.Status.PodIP)
	if p.Status.Phase != "Running" || err != nil {
		return p.Metadata, nil, nil
	}
	return p.Metadata, []discovery.Peer{{
		Addr: netip.AddrPortFrom(ip, 0), Identity: p.Metadata.UID, Since: p.Metadata.CreationTimestamp,
	}}, nil
}

// slicePeers reads an EndpointSlice. Endpoints that are not ready count: whether
// a node lives is found by talking to it.
func slicePeers(b []byte) (meta, []discovery.Peer, error) {
	var s slice
	if err := json.Unmarshal(b, &s); err != nil {
		return meta{}, nil, err
	}
	if s.Metadata.Name == "" {
		return meta{}, nil, errObject
	}
	var peers []discovery.Peer
	for _, e := range s.Endpoints[:min(len(s.Endpoints), maxEndpoints)] {
		if len(e.Addresses) == 0 {
			continue
		}
		ip, err := netip.ParseAddr(e.Addresses[0]) // further ones are of the same endpoint
		if err != nil {
			continue
		}
		p := discovery.Peer{Addr: netip.AddrPortFrom(ip, 0)}
		if e.TargetRef != nil {
			p.Identity = e.TargetRef.UID
		}
		peers = append(peers, p)
	}
	return s.Metadata, peers, nil
}
