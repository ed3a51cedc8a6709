package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/core/config"
)

// ScenarioParts are the components that scenarios may use.
type ScenarioParts struct {
	Interceptors []channel.Factory[channel.Interceptor]
	Memberships  []channel.Factory[channel.Membership]
}

// ScenarioReport is the outcome of a scenario.
type ScenarioReport struct {
	Name string `json:"name"`
	Seed uint64 `json:"seed"`
	// Passed: everything that was expected has happened.
	Passed bool `json:"passed"`
	// Failures says what has not.
	Failures []string `json:"failures"`
	// Events is what happened, with virtual times since the start: the same for
	// the same scenario and seed.
	Events []string `json:"events"`
	// Virtual and Real are how long it took, in seconds.
	Virtual float64 `json:"virtualSeconds"`
	Real    float64 `json:"seconds"`
}

// maxScenarioEvents bounds the log of a run.
const maxScenarioEvents = 100_000

// RunScenarioFile reads a scenario and runs it under go test; see RunScenario.
func RunScenarioFile(t *testing.T, file string, p ScenarioParts) *ScenarioReport {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ReadScenario(file, text)
	if err != nil {
		t.Fatal(err)
	}
	return RunScenario(t, s, p)
}

// RunScenario runs a scenario under go test, in virtual time. What was expected
// and has not happened fails t, with the log of events.
func RunScenario(t *testing.T, s *Scenario, p ScenarioParts) *ScenarioReport {
	t.Helper()
	report, err := newStory(s, p).run(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range report.Failures {
		t.Error(f)
	}
	if !report.Passed {
		t.Logf("scenario %s, seed %d:\n%s", report.Name, report.Seed, strings.Join(report.Events, "\n"))
	}
	return report
}

// MainScenario runs a scenario outside of go test and prints its events and the
// verdict to out. The code is 0 when everything expected has happened, 1 when
// not, 2 when it could not run; the report is never nil. Like [Main] it must not
// be called concurrently.
func MainScenario(s *Scenario, p ScenarioParts, out io.Writer) (report *ScenarioReport, code int) {
	var err error
	output, hErr := harness("scenario", func(t *testing.T) { report, err = newStory(s, p).run(t) })
	if report == nil {
		report = &ScenarioReport{Name: s.Name, Seed: s.Seed, Failures: []string{}, Events: []string{}}
		if err == nil && hErr == nil {
			err = fmt.Errorf("conformance: the scenario did not end: %s", strings.TrimSpace(output))
		}
	}
	for _, e := range report.Events {
		fmt.Fprintln(out, e)
	}
	if err = errors.Join(err, hErr); err != nil {
		fmt.Fprintf(out, "scenario %s could not run: %v\n", s.Name, err)
		return report, 2
	}
	for _, f := range report.Failures {
		fmt.Fprintf(out, "FAILED: %s\n", f)
	}
	verdict := "passed"
	if !report.Passed {
		verdict, code = fmt.Sprintf("failed (%d)", len(report.Failures)), 1
	}
	fmt.Fprintf(out, "scenario %s: %s, seed %d, %.0f s of virtual time in %.2f s\n", s.Name, verdict, s.Seed, report.Virtual, report.Real)
	return report, code
}

// story is one run of a scenario.
type story struct {
	s           *Scenario
	layers      *channel.Registry[channel.Interceptor]
	memberships *channel.Registry[channel.Membership]
	err         error

	nw    *channeltest.SimNet
	begin time.Time
	nodes []*actor // by number, from 1
	busy  sync.WaitGroup

	mu       sync.Mutex // guards what follows
	events   []storyEvent
	failures []string
	side     map[int]int // of a partition
	cuts     map[[2]int]bool
	changed  map[[2]int]time.Time // when nodes could last not reach each other
	rows     []*row
	got      map[delivery]int
	orders   map[[2]int][]int // row and receiver: the numbers as they came
	foreign  int              // bodies that nobody sent
}

type storyEvent struct {
	at   time.Duration
	text string
}

// actor is a node's address with what runs there.
type actor struct {
	number int
	name   string
	sim    *channeltest.SimNode
	ch     *channel.Channel // nil if nothing runs
	// The following are guarded by story.mu.
	up      bool
	id      channel.UniqueID
	here    map[channel.UniqueID]bool // members in the view, to check events
	started time.Time
}

// row is the messages of one Traffic.
type row struct {
	number int
	// results per message: one for each receiver it was to reach.
	sent []*sending
}

type sending struct {
	s      *story
	to     map[channel.UniqueID]int // receivers by id
	ended  int
	failed map[int]bool
	none   bool // no acknowledgement was asked for
}

type delivery struct{ row, number, receiver int }

// Complete implements channel.Completion.
func (x *sending) Complete(_ *channel.Message, err error) {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	x.ended++
	var se *channel.SendError
	switch {
	case err == nil:
	case errors.As(err, &se):
		for _, f := range se.Faults {
			x.failed[x.to[f.Member.ID]] = true
		}
	default:
		for _, n := range x.to {
			x.failed[n] = true
		}
	}
}

func newStory(s *Scenario, p ScenarioParts) *story {
	st := &story{
		s: s, nodes: make([]*actor, s.Nodes+1),
		cuts: map[[2]int]bool{}, changed: map[[2]int]time.Time{}, got: map[delivery]int{}, orders: map[[2]int][]int{},
	}
	var errs [2]error
	st.layers, errs[0] = channel.NewRegistry("interceptor", p.Interceptors...)
	st.memberships, errs[1] = channel.NewRegistry("membership", p.Memberships...)
	st.err = errors.Join(errs[:]...)
	return st
}

func scenarioIP(n int) string { return "10.0.0." + strconv.Itoa(n) }

// run plays the scenario in a bubble below t. Its error says that it could not.
func (st *story) run(t *testing.T) (*ScenarioReport, error) {
	if st.err != nil {
		return nil, st.err
	}
	report := &ScenarioReport{Name: st.s.Name, Seed: st.s.Seed, Failures: []string{}, Events: []string{}}
	start := time.Now()
	channeltest.Run(t, channeltest.SimConfig{Seed: st.s.Seed, Link: st.s.Link.policy()}, func(_ *testing.T, nw *channeltest.SimNet) {
		st.nw, st.begin = nw, time.Now()
		st.err = st.play()
		report.Virtual = time.Since(st.begin).Seconds()
		st.stopAll()
	})
	report.Real = time.Since(start).Seconds()
	st.mu.Lock()
	defer st.mu.Unlock()
	// What happens at one instant has no order.
	slices.SortStableFunc(st.events, func(a, b storyEvent) int {
		if a.at != b.at {
			return int(a.at - b.at)
		}
		return strings.Compare(a.text, b.text)
	})
	for _, e := range st.events {
		report.Events = append(report.Events, fmt.Sprintf("%10.3fs %s", e.at.Seconds(), e.text))
	}
	report.Failures = append(report.Failures, st.failures...)
	report.Passed = len(report.Failures) == 0
	return report, st.err
}

// A step happens a little after its time, every one by another bit: what happens
// at the same instant as a heartbeat has no order, and runs would differ.
const (
	stepOffset  = 3137 * time.Microsecond
	stepStagger = 41 * time.Microsecond
)

// play goes through the timeline.
func (st *story) play() error {
	for n := 1; n <= st.s.Nodes; n++ {
		if err := st.start(n); err != nil {
			return err
		}
		time.Sleep(7 * time.Millisecond) // nobody ticks in step
	}
	for i, step := range st.s.Timeline {
		time.Sleep(time.Until(st.begin.Add(step.At + stepOffset + time.Duration(i)*stepStagger)))
		if err := st.act(step); err != nil {
			return fmt.Errorf("%s: %w", step.Pos, err)
		}
	}
	st.busy.Wait()
	// From the next full second, so that the end does not depend on how the
	// last messages came through.
	rest := time.Second - time.Since(st.begin)%time.Second
	time.Sleep(rest + st.s.Quiet)
	synctest.Wait()
	st.finally()
	return nil
}

func (st *story) note(format string, args ...any) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.noteLocked(format, args...)
}

func (st *story) noteLocked(format string, args ...any) {
	if len(st.events) < maxScenarioEvents {
		st.events = append(st.events, storyEvent{time.Since(st.begin), fmt.Sprintf(format, args...)})
	}
}

func (st *story) fail(format string, args ...any) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.failLocked(format, args...)
}

func (st *story) failLocked(format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	st.noteLocked("FAILED %s", what)
	if len(st.failures) < maxScenarioSteps {
		st.failures = append(st.failures, what)
	}
}

// stack makes new layers for a node.
func (st *story) stack(list []config.Component, s channel.Settings) (*channel.Stack, error) {
	layers := make([]channel.Layer, 0, len(list))
	for _, c := range list {
		f, err := st.layers.Get(c.Use)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Pos, err)
		}
		i, err := f.New(c.Decode, s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Pos, err)
		}
		layers = append(layers, channel.Layer{Interceptor: i, Origin: c.Pos.String()})
	}
	return channel.NewStack(layers...)
}

func (st *story) settings(a *actor) channel.Settings {
	return channel.Settings{Name: a.name, Net: a.sim, Logger: zap.NewNop(), Metrics: channel.NewMetrics()}
}

// start begins an incarnation of a node.
func (st *story) start(n int) error {
	if _, up := st.actor(n); up {
		return fmt.Errorf("start: n%d runs already", n)
	}
	a := &actor{number: n, name: "n" + strconv.Itoa(n), sim: st.nw.Node(scenarioIP(n)), here: map[channel.UniqueID]bool{}}
	s := st.settings(a)
	list := st.s.Stack
	for _, x := range st.s.Stacks {
		if x.Node == n {
			list = x.Stack
		}
	}
	stack, err := st.stack(list, s)
	if err != nil {
		return err
	}
	f, err := st.memberships.Get(st.s.Membership.Use)
	if err != nil {
		return err
	}
	membership, err := f.New(st.s.Membership.Decode, s)
	if err != nil {
		return err
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = a.sim.IP()
	a.ch, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: a.name, Pipelined: true},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
		Membership:   membership,
	}, s)
	if err != nil {
		return err
	}
	st.mu.Lock()
	st.nodes[n] = a
	a.up, a.started = true, time.Now()
	st.mu.Unlock()
	a.ch.Listen(channel.ListenerFunc(func(_ context.Context, m *channel.Message) (bool, error) {
		st.receive(a, m.Body)
		return true, nil
	}))
	a.ch.Watch(func(_ channel.View, ev channel.MemberEvent) { st.watch(a, ev) })
	if err := a.ch.Start(context.Background()); err != nil {
		return err
	}
	st.mu.Lock()
	a.id = a.ch.Local().ID
	st.noteLocked("%s starts", a.name)
	st.mu.Unlock()
	return nil
}

// actor returns the last incarnation of a node, and whether it runs.
func (st *story) actor(n int) (*actor, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	a := st.nodes[n]
	return a, a != nil && a.up
}

// end ends an incarnation; how is crash, kill or stop.
func (st *story) end(n int, how string) error {
	a, up := st.actor(n)
	if !up {
		return fmt.Errorf("%s: n%d does not run", how, n)
	}
	st.mu.Lock()
	a.up = false
	st.noteLocked("%s: %s", how, a.name)
	st.mu.Unlock()
	switch how {
	case "crash":
		a.sim.Crash()
	case "kill":
		a.sim.Kill()
	}
	st.busy.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		err := a.ch.Stop(ctx)
		if how == "stop" {
			a.sim.Kill() // the process is gone; its address may be taken again
			if err != nil {
				st.fail("%s did not stop in order: %v", a.name, err)
			}
		}
	})
	return nil
}

func (st *story) stopAll() {
	for n := range st.nodes {
		a, up := st.actor(n)
		if !up {
			continue
		}
		st.mu.Lock()
		a.up = false
		st.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_ = a.ch.Stop(ctx) // the network may be cut: what could not be sent is lost
		cancel()
	}
	st.busy.Wait()
}

// act does one step.
func (st *story) act(step Step) error {
	switch {
	case len(step.Partition) > 0:
		st.partition(step.Partition)
	case step.Heal:
		st.heal()
	case step.Link != nil:
		st.link(*step.Link)
	case step.Crash != 0:
		return st.end(step.Crash, "crash")
	case step.Kill != 0:
		return st.end(step.Kill, "kill")
	case step.Stop != 0:
		return st.end(step.Stop, "stop")
	case step.Start != 0:
		return st.start(step.Start)
	case step.Swap != nil:
		return st.swap(step)
	case step.Send != nil:
		return st.send(*step.Send)
	case step.Expect != nil:
		st.busy.Go(func() { st.expect(step) })
	}
	return nil
}

func (st *story) partition(groups [][]int) {
	ips := make([][]string, len(groups))
	side := map[int]int{}
	for i, g := range groups {
		for _, n := range g {
			ips[i] = append(ips[i], scenarioIP(n))
			side[n] = i + 1
		}
	}
	st.nw.Partition(ips...)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.disturb()
	st.side = side
	st.disturb()
	st.noteLocked("partition: %v", groups)
}

func (st *story) heal() {
	st.nw.Heal()
	st.nw.ResetLinks()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.disturb()
	st.side = nil
	clear(st.cuts)
	st.noteLocked("heal")
}

func (st *story) link(l LinkFault) {
	st.nw.SetLink(scenarioIP(l.From), scenarioIP(l.To), l.policy())
	st.mu.Lock()
	defer st.mu.Unlock()
	st.disturb()
	// A link that loses everything, or most, is as good as cut.
	st.cuts[[2]int{l.From, l.To}] = l.Cut || l.Loss > 0.5
	st.disturb()
	st.noteLocked("link n%d to n%d: latency %v, jitter %v, loss %v, cut %v", l.From, l.To, l.Latency, l.Jitter, l.Loss, l.Cut)
}

// disturb notes who cannot reach whom now; st.mu is held.
func (st *story) disturb() {
	for a := 1; a <= st.s.Nodes; a++ {
		for b := 1; b <= st.s.Nodes; b++ {
			if !st.reach(a, b) {
				st.changed[[2]int{a, b}] = time.Now()
			}
		}
	}
}

// reach reports whether two nodes can talk; st.mu is held.
func (st *story) reach(a, b int) bool {
	return (st.side == nil || st.side[a] == st.side[b]) && !st.cuts[[2]int{a, b}] && !st.cuts[[2]int{b, a}]
}

func (st *story) swap(step Step) error {
	a, up := st.actor(step.Swap.Node)
	if !up {
		return fmt.Errorf("swap: n%d does not run", step.Swap.Node)
	}
	stack, err := st.stack(step.Swap.Stack, st.settings(a))
	if err != nil {
		return err
	}
	var names []string
	for _, l := range stack.Layers() {
		names = append(names, l.Name)
	}
	st.note("swap: %s to %v", a.name, names)
	st.busy.Go(func() {
		if err := a.ch.Swap(context.Background(), stack); err != nil {
			st.fail("swap of %s: %v", a.name, err)
		}
	})
	return nil
}

// falseRemoval is how long two nodes must have been able to talk for a removal
// to be wrong.
const falseRemoval = 3 * time.Second

// watch notes a change of a view and checks that it makes sense.
func (st *story) watch(a *actor, ev channel.MemberEvent) {
	if ev.Kind == 0 {
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	who, id := ev.Member.Name(), ev.Member.ID
	if ev.Kind != channel.MemberUpdated {
		st.noteLocked("%s: %s %s", a.name, who, ev.Kind)
	}
	switch ev.Kind {
	case channel.MemberAdded:
		if a.here[id] {
			st.failLocked("%s was told twice that %s is there", a.name, who)
		}
		a.here[id] = true
	case channel.MemberLost, channel.MemberLeft:
		if !a.here[id] {
			st.failLocked("%s was told that %s has gone, but not that it was there", a.name, who)
		}
		delete(a.here, id)
		if st.s.Finally.NoFalseRemovals {
			st.judgeRemoval(a, who, id)
		}
	}
}

// judgeRemoval complains if the member that was removed is fine; st.mu is held.
func (st *story) judgeRemoval(a *actor, who string, id channel.UniqueID) {
	for _, b := range st.nodes {
		if b == nil || b.id != id || !a.up || !b.up {
			continue
		}
		if time.Since(b.started) > falseRemoval && st.reach(a.number, b.number) && time.Since(st.changed[[2]int{a.number, b.number}]) > falseRemoval {
			st.failLocked("%s removed %s, which runs and can be reached", a.name, who)
		}
	}
}

// bodies are "row number" and dots up to their size.
func body(row, number, size int) []byte {
	b := fmt.Appendf(nil, "%d %d ", row, number)
	return append(b, bytes.Repeat([]byte{'.'}, max(0, size-len(b)))...)
}

func parseBody(b []byte) (row, number int, ok bool) {
	fields := strings.SplitN(string(b), " ", 3)
	if len(fields) != 3 || strings.Trim(fields[2], ".") != "" {
		return 0, 0, false
	}
	row, err1 := strconv.Atoi(fields[0])
	number, err2 := strconv.Atoi(fields[1])
	return row, number, err1 == nil && err2 == nil
}

func (st *story) receive(a *actor, b []byte) {
	r, n, ok := parseBody(b)
	st.mu.Lock()
	defer st.mu.Unlock()
	if !ok || r < 0 || r >= len(st.rows) || n < 0 || n >= len(st.rows[r].sent) {
		st.foreign++
		return
	}
	st.got[delivery{r, n, a.number}]++
	key := [2]int{r, a.number}
	st.orders[key] = append(st.orders[key], n)
}

// send begins a row of messages.
func (st *story) send(x Traffic) error {
	a, up := st.actor(x.From)
	if !up {
		return fmt.Errorf("send: n%d does not run", x.From)
	}
	st.mu.Lock()
	r := &row{number: len(st.rows)}
	st.rows = append(st.rows, r)
	st.noteLocked("row %d: %s sends %d messages", r.number, a.name, x.Count)
	st.mu.Unlock()
	st.busy.Go(func() {
		for n := range x.Count {
			if n > 0 {
				time.Sleep(x.Every)
			}
			st.sendOne(a, r, n, x)
		}
	})
	return nil
}

func (st *story) sendOne(a *actor, r *row, n int, x Traffic) {
	var to []channel.Member
	out := &sending{s: st, to: map[channel.UniqueID]int{}, failed: map[int]bool{}, none: x.Options == "none"}
	for _, m := range a.ch.View().Members {
		number, err := strconv.Atoi(strings.TrimPrefix(m.Name(), "n"))
		if err == nil && (len(x.To) == 0 || slices.Contains(x.To, number)) {
			to = append(to, m)
			out.to[m.ID] = number
		}
	}
	st.mu.Lock()
	r.sent = append(r.sent, out)
	for _, number := range x.To {
		if !slices.ContainsFunc(to, func(m channel.Member) bool { return out.to[m.ID] == number }) {
			out.failed[number] = true // not in the view
		}
	}
	st.mu.Unlock()
	if len(to) == 0 {
		st.mu.Lock()
		out.ended++
		st.mu.Unlock()
		return
	}
	if err := a.ch.SendDone(context.Background(), to, body(r.number, n, x.Size), x.options(), out); err != nil {
		out.Complete(nil, err)
	}
}

// expect waits for what a step wants.
func (st *story) expect(step Step) {
	const poll = 10 * time.Millisecond
	start := time.Now()
	for {
		what, err := st.holds(*step.Expect)
		took := time.Since(start)
		if err == nil {
			st.note("expected %s: after %v", what, took)
			return
		}
		if took >= step.Expect.Within {
			st.fail("%s: expected %s within %v: %v", step.Pos, what, step.Expect.Within, err)
			return
		}
		time.Sleep(min(poll, step.Expect.Within-took))
	}
}

func (st *story) holds(e Expect) (what string, err error) {
	if e.Removed != 0 {
		what = fmt.Sprintf("n%d removed", e.Removed)
		by := e.By
		if len(by) == 0 {
			for n := 1; n <= st.s.Nodes; n++ {
				by = append(by, n)
			}
		}
		gone := "n" + strconv.Itoa(e.Removed)
		for _, n := range by {
			if n != e.Removed && slices.Contains(st.sees(n), gone) {
				return what, fmt.Errorf("n%d still sees it", n)
			}
		}
	}
	if len(e.Views) > 0 {
		if what != "" {
			what += " and "
		}
		what += fmt.Sprintf("views %v", e.Views)
		if err := st.equal(e.Views); err != nil {
			return what, err
		}
	}
	return what, nil
}

// sees returns the names in a node's view, its own too; nil if it does not run.
func (st *story) sees(n int) []string {
	a, up := st.actor(n)
	if !up {
		return nil
	}
	names := []string{a.name}
	for _, m := range a.ch.View().Members {
		names = append(names, m.Name())
	}
	slices.Sort(names)
	return names
}

func (st *story) equal(groups [][]int) error {
	for _, g := range groups {
		var want []string
		for _, n := range g {
			want = append(want, "n"+strconv.Itoa(n))
		}
		slices.Sort(want)
		for _, n := range g {
			if got := st.sees(n); !slices.Equal(got, want) {
				return fmt.Errorf("n%d sees %v", n, got)
			}
		}
	}
	return nil
}

// finally checks what must hold at the end.
func (st *story) finally() {
	f := st.s.Finally
	if err := st.equal(f.Views); err != nil {
		st.fail("finally: views %v: %v", f.Views, err)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.foreign > 0 {
		st.failLocked("finally: %d messages arrived that nobody sent", st.foreign)
	}
	for _, r := range st.rows {
		st.judge(r)
	}
}

// judge checks the messages of one row; st.mu is held.
func (st *story) judge(r *row) {
	f := st.s.Finally
	confirmed, failed, pending, delivered, twice, missing := 0, 0, 0, 0, 0, 0
	for n, x := range r.sent {
		switch x.ended {
		case 0:
			pending++
		case 1:
		default:
			st.failLocked("row %d, message %d: its result was told %d times", r.number, n, x.ended)
		}
		failed += len(x.failed)
		for _, to := range x.to {
			got := st.got[delivery{r.number, n, to}]
			delivered += got
			if got > 1 {
				twice++
			}
			if x.ended == 1 && !x.failed[to] && !x.none {
				confirmed++
				if got == 0 {
					missing++
				}
			}
		}
	}
	st.noteLocked("row %d: %d messages, %d deliveries; confirmed %d, failed %d", r.number, len(r.sent), delivered, confirmed, failed)
	if pending > 0 {
		st.failLocked("row %d: the result of %d messages was never told", r.number, pending)
	}
	if f.Delivered != "" && twice > 0 {
		st.failLocked("row %d: %d deliveries were made more than once", r.number, twice)
	}
	if f.Delivered == exactlyOnce && missing > 0 {
		st.failLocked("row %d: %d confirmed messages were not delivered", r.number, missing)
	}
	if f.Confirmed && failed > 0 {
		st.failLocked("row %d: %d messages failed", r.number, failed)
	}
	if !f.Ordered {
		return
	}
	for n := 1; n <= st.s.Nodes; n++ {
		if !slices.IsSorted(st.orders[[2]int{r.number, n}]) {
			st.failLocked("row %d: the messages arrived at n%d in another order", r.number, n)
		}
	}
}
