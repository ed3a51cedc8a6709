package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// drainQuiet: when no request has come for so long, balancers have noticed.
	drainQuiet = time.Second
	// drainPoll is how often that is looked at.
	drainPoll = 50 * time.Millisecond
	// drainAgain is the pause before it is asked again who has the sessions for
	// which nobody has spoken up.
	drainAgain = 100 * time.Millisecond
	// maxDrainLogged bounds the sessions that the log names.
	maxDrainLogged = 100
	// drainFile is the whole list, in the working directory.
	drainFile = "drain.json"
)

// States of a DrainReport.
const (
	// DrainNone: the node has not been told to stop.
	DrainNone = "serving"
	// DrainServing: users of the node are still served, new ones are not.
	DrainServing = "draining: waiting for balancers"
	// DrainClosing: running requests are waited for; there are no new ones.
	DrainClosing = "draining: running requests"
	// DrainAsking: the sessions are being handed over.
	DrainAsking = "draining: handing over"
	// Drained: every session is somewhere else too.
	Drained = "drained"
	// DrainIncomplete: some are not; Problems says why.
	DrainIncomplete = "incomplete"
)

// DrainReport says what has become of the sessions of a node that was told to
// stop: POST or GET /v1/drain.
type DrainReport struct {
	State string    `json:"state"`
	Since time.Time `json:"since,omitzero"`
	Took  float64   `json:"tookSeconds"`
	// Sessions are the living ones that this node knew, in its tables or as a
	// copy; HandedOver those of which another member, or the store, has said
	// that it has them in the same state; Left the others.
	Sessions   int `json:"sessions"`
	HandedOver int `json:"handedOver"`
	Left       int `json:"left"`
	// Holders is how many sessions each of them has.
	Holders map[string]int `json:"holders"`
	// Problems are sentences for people.
	Problems []string `json:"problems"`
	// List names the sessions, those that are left first.
	List []HandedOver `json:"list"`
}

// HandedOver is one session of a report.
type HandedOver struct {
	Manager string `json:"manager"`
	Context string `json:"context"`
	// Session is a prefix of the id.
	Session string `json:"session"`
	// Holders have it; empty if nobody has.
	Holders []string `json:"holders"`
	// Digest is the hash of its attributes, hexadecimal, that they confirmed.
	Digest string `json:"digest"`
}

// drain is the one drain of a node.
type drain struct {
	begun atomic.Bool
	asked chan struct{} // closed when somebody has asked for it
	done  chan struct{} // closed when it is over
	once  sync.Once

	mu     sync.Mutex
	report DrainReport // guarded by mu; the list is not changed once it is there
	// going are members that drain, too; told are those who know that this node
	// does. Guarded by mu.
	going, told map[channel.UniqueID]bool
}

func newDrain() *drain {
	return &drain{
		asked: make(chan struct{}), done: make(chan struct{}), report: DrainReport{State: DrainNone},
		going: map[channel.UniqueID]bool{}, told: map[channel.UniqueID]bool{},
	}
}

// drainSubject is the subject of the word that a node drains.
const drainSubject = "drain"

// tellTimeout bounds how long members are waited for that are told so.
const tellTimeout = time.Second

// heardDrain takes the word of another node.
func (n *Node) heardDrain(_ context.Context, m *channel.Message, _ []byte) error {
	n.drain.mu.Lock()
	defer n.drain.mu.Unlock()
	if len(n.drain.going) < maxGoing {
		n.drain.going[m.From.ID] = true
	}
	return nil
}

// maxGoing bounds the members that are remembered as draining; it is the bound
// of members.
const maxGoing = 4096

// tellOthers tells those who do not know it yet that this node drains, and
// returns those who do so, too. It is done before anybody is asked for sessions.
// So of two nodes that drain at the same time one at most is named as a holder by
// the other: who asks first has told the other before, which then does not count
// on it.
func (n *Node) tellOthers(ctx context.Context) (going []channel.UniqueID) {
	if n.cluster == nil {
		return nil
	}
	members := n.cluster.channel.View().Members
	var to []channel.Member
	n.drain.mu.Lock()
	for _, m := range members {
		if !n.drain.told[m.ID] {
			to = append(to, m)
		}
	}
	n.drain.mu.Unlock()
	if len(to) > 0 {
		ctx, cancel := context.WithTimeout(ctx, tellTimeout)
		err := n.cluster.shared.Send(ctx, drainSubject, to, channel.SendSyncAck, nil)
		cancel()
		var faults *channel.SendError
		if err != nil && !errors.As(err, &faults) {
			to = nil
		}
		n.drain.mu.Lock()
		for _, m := range to {
			n.drain.told[m.ID] = faults == nil || !slices.ContainsFunc(faults.Faults, func(f channel.Fault) bool { return f.Member.Is(m) })
		}
		n.drain.mu.Unlock()
	}
	n.drain.mu.Lock()
	defer n.drain.mu.Unlock()
	for _, m := range members {
		if n.drain.going[m.ID] {
			going = append(going, m.ID)
		}
	}
	return going
}

// is reports whether the node drains, or has done so.
func (d *drain) is() bool { return d.begun.Load() }

func (d *drain) set(f func(*DrainReport)) {
	d.mu.Lock()
	f(&d.report)
	d.mu.Unlock()
}

// DrainAsked is closed when the node has been told to drain, by Drain or through
// the admin API. Whoever runs the node stops it then.
func (n *Node) DrainAsked() <-chan struct{} { return n.drain.asked }

// Drain prepares the node for its stop, in drain_timeout at most: it reports
// that it is not ready, takes no new sessions, serves its users until no request
// comes any more or drain_grace is over (every response waits for level sync
// then, so that the user's next node knows what this one knew), closes the connectors, commits
// everything at level sync and asks the managers who has the sessions, until
// somebody else has every one of them. If it is draining already it waits for
// that. When ctx ends first the rest is not waited for. The node does not take
// part in anything new afterwards and is to be stopped.
func (n *Node) Drain(ctx context.Context) DrainReport {
	n.beginDrain()
	select {
	case <-n.drain.done:
	case <-ctx.Done():
		n.drainCancel() // in a hurry
		<-n.drain.done
	}
	return n.DrainReport(0)
}

// beginDrain begins it in the background, once.
func (n *Node) beginDrain() {
	n.drain.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), n.cfg.Node.DrainTimeout)
		n.drainCancel = cancel
		n.drain.set(func(r *DrainReport) { r.State, r.Since = DrainServing, time.Now() })
		n.drain.begun.Store(true)
		close(n.drain.asked)
		go func() { // ends with ctx; stop waits for it
			defer close(n.drain.done)
			defer cancel()
			n.runDrain(ctx)
		}()
	})
}

// DrainReport returns the report as it is now, with up to limit sessions.
func (n *Node) DrainReport(limit int) DrainReport {
	n.drain.mu.Lock()
	defer n.drain.mu.Unlock()
	r := n.drain.report
	r.Holders, r.Problems = maps.Clone(r.Holders), slices.Clone(r.Problems)
	r.List = r.List[:min(limit, len(r.List)):min(limit, len(r.List))]
	return r
}

func (n *Node) allSessions() []*sessions {
	var all []*sessions
	if n.cluster != nil {
		all = append(all, n.cluster.sessions...)
	}
	return append(all, n.local)
}

func (n *Node) runDrain(ctx context.Context) {
	start := time.Now()
	for _, s := range n.allSessions() {
		s.table.Drain()
	}
	n.log.Info("draining: no new sessions; users are served until balancers have noticed",
		zap.Int("members", n.memberCount()), zap.Duration("grace", n.cfg.Node.DrainGrace), zap.Duration("timeout", n.cfg.Node.DrainTimeout))
	n.tellOthers(ctx) // as early as can be: others may be told to stop at the same time
	if n.memberCount() > 1 {
		n.awaitQuiet(ctx)
	}
	n.drain.set(func(r *DrainReport) { r.State = DrainClosing })
	var problems []string
	for _, c := range n.connectors {
		// Half of what is left, so that there is time for the sessions.
		left, _ := ctx.Deadline()
		stop, cancel := context.WithTimeout(ctx, time.Until(left)/2)
		if err := c.Stop(stop); err != nil {
			problems = append(problems, err.Error())
		}
		cancel()
	}
	n.drain.set(func(r *DrainReport) { r.State = DrainAsking })
	report := n.handOver(ctx)
	report.Problems = append(problems, report.Problems...)
	n.metrics.Counter("drain_handed_over_total", "Sessions of which another member, or the store, confirmed that it has them when this node was drained.").Add(int64(report.HandedOver))
	n.metrics.Counter("drain_left_total", "Sessions that nobody else was known to have when this node was drained.").Add(int64(report.Left))
	n.drain.set(func(r *DrainReport) {
		report.Since, report.Took = r.Since, time.Since(start).Seconds()
		*r = report
	})
	n.tellDrained(report)
}

// awaitQuiet returns when no request has come for drainQuiet, or after
// drain_grace.
func (n *Node) awaitQuiet(ctx context.Context) {
	requests := n.metrics.Counter("http_requests_total", "Requests that reached the engine.")
	last := requests.Value()
	if last == 0 {
		return // nobody knows this node
	}
	end := time.NewTimer(n.cfg.Node.DrainGrace)
	defer end.Stop()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for since := time.Now(); time.Since(since) < drainQuiet; {
		select {
		case <-ctx.Done():
			return
		case <-end.C:
			n.log.Warn("draining: requests still come; the connectors are closed now. Does the balancer look at /readyz?")
			return
		case now := <-tick.C:
			if v := requests.Value(); v != last {
				last, since = v, now
			}
		}
	}
}

// handOver sees to it that somebody else has every session, and says who.
func (n *Node) handOver(ctx context.Context) DrainReport {
	r := DrainReport{State: Drained, Holders: map[string]int{}}
	for _, s := range n.allSessions() {
		n.handOverTable(ctx, s, &r)
	}
	for _, h := range r.List {
		r.Sessions++
		if len(h.Holders) == 0 {
			r.Left++
			continue
		}
		r.HandedOver++
		for _, name := range h.Holders {
			r.Holders[name]++
		}
	}
	if r.Left > 0 || len(r.Problems) > 0 {
		r.State = DrainIncomplete
	}
	slices.SortStableFunc(r.List, func(a, b HandedOver) int { return min(len(a.Holders), 1) - min(len(b.Holders), 1) })
	return r
}

func (n *Node) handOverTable(ctx context.Context, s *sessions, r *DrainReport) {
	left := map[session.Key]bool{} // of which nobody else has spoken up
	note := func(w core.Whereabouts) {
		r.List = append(r.List, HandedOver{
			Manager: s.name, Context: w.Key.Context, Session: session.Prefix(w.Key.ID),
			Holders: w.Holders, Digest: fmt.Sprintf("%016x", w.Content),
		})
	}
	why := "they are not replicated"
	h, ok := s.manager.(core.Handover)
	switch {
	case ok:
		p := &proving{n: n, s: s, h: h, left: left, note: note, pages: 1}
		if why = p.run(ctx); p.page < p.pages {
			r.Problems = append(r.Problems, fmt.Sprintf("manager %s: it is not known which other sessions it has: %s", s.name, why))
		}
	case s.manager != nil:
		why = core.ErrNoHandover.Error()
		fallthrough
	default:
		for _, k := range s.table.Keys() {
			left[k] = true
		}
	}
	for k := range left {
		content, _ := s.table.Content(k)
		note(core.Whereabouts{Key: k, Content: content})
	}
	if len(left) > 0 {
		r.Problems = append(r.Problems, fmt.Sprintf("manager %s: %d sessions are not handed over: %s", s.name, len(left), why))
	}
}

// proving is the search for the holders of one manager's sessions.
type proving struct {
	n    *Node
	s    *sessions
	h    core.Handover
	left map[session.Key]bool
	note func(core.Whereabouts)
	seen map[session.Key]bool // of the table
	// page is the next one to be asked for, of pages.
	page, pages int
	// going are the members that drain, too.
	going []channel.UniqueID
}

// read asks for the pages that have not been asked for.
func (p *proving) read(ctx context.Context) error {
	for p.page < p.pages {
		a, err := p.h.Where(ctx, core.WhereQuery{Page: p.page, Going: p.going})
		if err != nil {
			return err
		}
		p.pages = a.Pages
		p.page++
		p.take(a)
	}
	p.pages = p.page
	return nil
}

// run asks until nothing is left, nobody is there to ask, or ctx ends; it
// returns why there is something left.
func (p *proving) run(ctx context.Context) (why string) {
	why = "nobody has confirmed that it has them"
	explain := func(err error) {
		if err != nil && ctx.Err() == nil {
			why = err.Error()
		}
	}
	explain(p.s.table.FlushSynced(ctx))
	p.seen = map[session.Key]bool{}
	p.going = p.n.tellOthers(ctx)
	err := p.read(ctx)
	explain(err)
	for _, k := range p.s.table.Keys() {
		if !p.seen[k] {
			p.left[k] = true
		}
	}
	if errors.Is(err, core.ErrNoHandover) {
		return why
	}
	for round := 0; len(p.left) > 0 || p.page < p.pages; round++ {
		if round > 0 {
			p.going = p.n.tellOthers(ctx)
			if others := p.n.memberCount() - 1; others <= len(p.going) && p.inMembers() {
				if others > 0 {
					return "all other members are going to stop, too"
				}
				return "there is no other member to take them"
			}
		}
		if round > 0 && !channel.Pause(ctx, drainAgain) || ctx.Err() != nil {
			return "the time to drain is over (node.drain_timeout): " + why
		}
		explain(p.read(ctx))
		keys := slices.Collect(maps.Keys(p.left))
		if round > 0 { // what has been asked for once is sent again
			explain(p.s.table.CommitAgain(ctx, keys))
		} else {
			explain(p.s.table.FlushSynced(ctx))
		}
		for part := range slices.Chunk(keys, core.MaxWhere/4) {
			a, err := p.h.Where(ctx, core.WhereQuery{Keys: part, Copy: round > 0, Going: p.going})
			explain(err)
			if err == nil {
				p.take(a)
			}
		}
	}
	return ""
}

// inMembers reports whether the sessions are with members. A store takes them
// from a single node too.
func (p *proving) inMembers() bool {
	a, err := p.h.Where(context.Background(), core.WhereQuery{})
	return err == nil && a.Pages > 0
}

// take notes what a manager says. What the table has counts: if the manager, and
// so the holder, has something else, the session is not handed over.
func (p *proving) take(a core.WhereAnswer) {
	for _, w := range a.Sessions {
		content, live := p.s.table.Content(w.Key)
		if live {
			p.seen[w.Key] = true
		}
		switch {
		case w.Content == 0 && !live && len(w.Holders) == 0:
			delete(p.left, w.Key) // it has ended meanwhile
		case len(w.Holders) > 0 && (!live || content == w.Content):
			delete(p.left, w.Key)
			p.note(w)
		default:
			p.left[w.Key] = true
		}
	}
}

// tellDrained logs the outcome and writes the whole list to the working
// directory, if the user has given one.
func (n *Node) tellDrained(r DrainReport) {
	fields := []zap.Field{
		zap.String("state", r.State), zap.Int("sessions", r.Sessions), zap.Int("handedOver", r.HandedOver), zap.Int("left", r.Left),
		zap.Any("holders", r.Holders), zap.Float64("tookSeconds", r.Took), zap.Any("list", r.List[:min(len(r.List), maxDrainLogged)]),
	}
	if !n.tempDir {
		file := filepath.Join(n.workDir, drainFile)
		text, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(file, text, 0o600)
		}
		if err != nil {
			n.log.Warn("the list of the sessions that were handed over could not be written", zap.String("file", file), zap.Error(err))
		} else {
			fields = append(fields, zap.String("wholeList", file))
		}
	}
	if r.State == Drained {
		n.log.Info("drained: all sessions are on other nodes", fields...)
		return
	}
	n.log.Error("drained incompletely: some sessions end with this node", append(fields, zap.Strings("problems", r.Problems))...)
}

var errDraining = errors.New("draining: the node is going to stop")
