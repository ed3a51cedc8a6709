package kubernetes

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"go.uber.org/zap"
)

const (
	// maxObjects bounds the objects that are held.
	maxObjects = 16384
	// relistPause is the least time between two lists that are asked for
	// without a pause in between.
	relistPause = 10 * time.Second
	// pageTimeouts is how many read timeouts a whole page may take.
	pageTimeouts = 6
)

// provider lists, then watches from there, and lists again when the API no
// longer knows the place.
type provider struct {
	cfg                       Config
	log                       *zap.Logger
	client                    *client
	relists, watches, refused *channel.Counter

	objects map[string][]discovery.Peer // by name
	version string                      // where the next watch begins; empty: list first
	listed  time.Time                   // when objects were listed
	empty   bool                        // that nothing matches has been said
}

// Run implements discovery.Provider. After an error of a watch the next one goes
// on where it ended.
func (p *provider) Run(ctx context.Context, found func([]discovery.Peer)) error {
	defer p.client.close()
	for ctx.Err() == nil {
		if p.version == "" {
			if err := p.list(ctx); err != nil {
				return fmt.Errorf("list: %w", err)
			}
			p.listed = time.Now()
			p.tell(found)
		}
		begin := time.Now()
		events, err := p.watch(ctx, found)
		switch {
		case ctx.Err() != nil:
		case gone(err) && time.Since(p.listed) >= relistPause:
			p.version = "" // the usual end of a long quiet time
		case gone(err):
			p.version = ""
			return fmt.Errorf("watch: %w", err)
		case err != nil:
			return fmt.Errorf("watch: %w", err)
		case events == 0 && time.Since(begin) < time.Second:
			return errors.New("watch: it ended at once")
		}
	}
	return ctx.Err()
}

// path returns the path of the objects, and the query that selects them.
func (p *provider) path() (string, url.Values) {
	q := url.Values{}
	ns := url.PathEscape(p.client.target.namespace)
	if p.cfg.Service != "" {
		q.Set("labelSelector", "kubernetes.io/service-name="+p.cfg.Service)
		return "/apis/discovery.k8s.io/v1/namespaces/" + ns + "/endpointslices", q
	}
	if l := p.client.target.labels; l != "" {
		q.Set("labelSelector", l)
	}
	return "/api/v1/namespaces/" + ns + "/pods", q
}

func (p *provider) read(object []byte) (meta, []discovery.Peer, error) {
	if p.cfg.Service != "" {
		return slicePeers(object)
	}
	return podPeers(object)
}

// list asks for all objects, page by page. Only a whole list is taken over.
func (p *provider) list(ctx context.Context) error {
	p.relists.Inc()
	path, query := p.path()
	query.Set("limit", strconv.Itoa(pageSize))
	objects := map[string][]discovery.Peer{}
	for {
		l, err := p.page(ctx, path, query)
		if err != nil {
			return err
		}
		for _, item := range l.Items {
			m, peers, err := p.read(item)
			if err != nil {
				p.refused.Inc()
				continue
			}
			if len(objects) >= maxObjects {
				return fmt.Errorf("more than %d objects match: narrow them down by labels or service", maxObjects)
			}
			objects[m.Name] = peers
		}
		if l.Metadata.Continue == "" {
			if l.Metadata.ResourceVersion == "" {
				return errors.New("the answer is no list of the API: it has no resourceVersion")
			}
			p.objects, p.version = objects, l.Metadata.ResourceVersion
			return nil
		}
		query.Set("continue", l.Metadata.Continue)
	}
}

func (p *provider) page(ctx context.Context, path string, query url.Values) (l list, err error) {
	ctx, cancel := context.WithTimeout(ctx, pageTimeouts*p.cfg.ReadTimeout)
	defer cancel()
	body, err := p.client.get(ctx, path, query)
	if err != nil {
		return l, err
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, maxList+1))
	if err != nil {
		return l, err
	}
	if len(b) > maxList {
		return l, fmt.Errorf("a page of the list has more than %d bytes", maxList)
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return l, fmt.Errorf("the list cannot be read: %w", err)
	}
	return l, nil
}

// tell reports all addresses.
func (p *provider) tell(found func([]discovery.Peer)) {
	var peers []discovery.Peer
	for _, name := range slices.Sorted(maps.Keys(p.objects)) {
		peers = append(peers, p.objects[name]...)
	}
	if len(peers) == 0 && !p.empty {
		p.log.Warn("no running pod matches, not even this node's; check namespace, labels and service",
			zap.String("namespace", p.client.target.namespace), zap.String("labels", p.client.target.labels), zap.String("service", p.cfg.Service))
	}
	p.empty = len(peers) == 0
	found(peers)
}

// watch follows the changes until the API ends the stream, as it does after the
// time that was asked for. It returns how many events there were.
func (p *provider) watch(ctx context.Context, found func([]discovery.Peer)) (events int, err error) {
	p.watches.Inc()
	path, query := p.path()
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("resourceVersion", p.version)
	query.Set("timeoutSeconds", strconv.Itoa(int(p.cfg.WatchTime/time.Second)))
	// Whatever the API does, a stream does not last much longer than that: a
	// connection that was cut in silence is noticed then.
	ctx, cancel := context.WithTimeout(ctx, p.cfg.WatchTime+p.cfg.ReadTimeout)
	defer cancel()
	body, err := p.client.get(ctx, path, query)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	lines := bufio.NewReaderSize(body, 64<<10)
	for {
		line, err := readLine(lines)
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return events, nil
		}
		if err != nil {
			return events, err
		}
		changed, err := p.apply(line)
		if err != nil {
			return events, err
		}
		events++
		if changed {
			p.tell(found)
		}
	}
}

// readLine reads a line of at most maxEvent bytes. The end of the stream within
// a line is an error.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxEvent {
			return nil, fmt.Errorf("an event has more than %d bytes", maxEvent)
		}
		switch {
		case err == nil:
			return append(line, part...), nil
		case errors.Is(err, bufio.ErrBufferFull):
			line = append(line, part...)
		case errors.Is(err, io.EOF) && len(line)+len(part) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// apply takes over an event; it reports whether addresses have changed.
func (p *provider) apply(line []byte) (changed bool, err error) {
	var ev event
	if err := json.Unmarshal(line, &ev); err != nil {
		p.version = "" // something may have been missed
		return false, fmt.Errorf("an event cannot be read: %w", err)
	}
	if ev.Type == "ERROR" {
		var s status
		_ = json.Unmarshal(ev.Object, &s) // an error without a reason is one, too
		p.version = ""
		return false, &apiError{s.Code, short(s.Message)}
	}
	if ev.Type == "BOOKMARK" {
		var b struct {
			Metadata meta `json:"metadata"`
		}
		if err := json.Unmarshal(ev.Object, &b); err != nil || b.Metadata.ResourceVersion == "" {
			p.refused.Inc()
			return false, nil
		}
		p.version = b.Metadata.ResourceVersion
		return false, nil
	}
	m, peers, err := p.read(ev.Object)
	if err != nil || m.ResourceVersion == "" {
		p.refused.Inc()
		return false, nil
	}
	p.version = m.ResourceVersion
	old, known := p.objects[m.Name]
	switch ev.Type {
	case "ADDED", "MODIFIED":
		if !known && len(p.objects) >= maxObjects {
			p.refused.Inc()
			return false, nil
		}
		p.objects[m.Name] = peers
	case "DELETED":
		delete(p.objects, m.Name)
		peers = nil
	default:
		p.refused.Inc()
		return false, nil
	}
	return !slices.EqualFunc(old, peers, samePeer), nil
}

func samePeer(a, b discovery.Peer) bool {
	return a.Identity == b.Identity && a.Addr.Compare(b.Addr) == 0 && a.Since.Equal(b.Since)
}
