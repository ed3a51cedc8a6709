package failuredetector

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

const probeBody = channel.ProbeBody

var (
	errNoAnswer    = errors.New("no answer")
	errWrongAnswer = errors.New("the answer is not that of a member")
)

// prober checks members over their own connections.
type prober struct {
	net transport.Net
	cfg Config
}

// check returns nil when m passes; mustAnswer says whether it has to
// acknowledge the message.
func (p *prober) check(ctx context.Context, local, m channel.Member, mustAnswer bool) error {
	var err error
	for range p.cfg.Attempts {
		if err = p.attempt(ctx, local, m, mustAnswer); err == nil || ctx.Err() != nil {
			break
		}
	}
	return err
}

// connections is how many an attempt opens at most.
const connections = 8

// attempt connects, and while there is no answer opens further connections,
// evenly over the time of connecting: on a network that loses packets each may
// wait long for its next packet. It ends when one of them passes or is turned
// down, when none has been accepted within the time of connecting, and when none
// is answered within the time of reading after the first was accepted.
func (p *prober) attempt(ctx context.Context, local, m channel.Member, mustAnswer bool) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	results, accepted := make(chan error, connections), make(chan struct{}, connections)
	next, end := time.NewTimer(0), time.NewTimer(p.cfg.ConnectTimeout)
	defer next.Stop()
	defer end.Stop()
	var last error
	begun, ended, reading := 0, 0, false
	for {
		select {
		case <-next.C:
			if begun++; begun < connections {
				next.Reset(p.cfg.ConnectTimeout / connections)
			}
			running.Go(func() { results <- p.once(ctx, local, m, mustAnswer, accepted) })
		case <-accepted:
			if !reading {
				reading = true
				end.Reset(p.cfg.ReadTimeout)
			}
		case <-end.C:
			switch {
			case last != nil:
				return last
			case reading:
				return fmt.Errorf("%w within %v", errNoAnswer, p.cfg.ReadTimeout)
			}
			return fmt.Errorf("connect: %w", os.ErrDeadlineExceeded)
		case err := <-results:
			ended++
			if err == nil || !channel.IsTimeout(err) || ctx.Err() != nil || ended == connections {
				return err
			}
			last = err
		}
	}
}

func (p *prober) once(ctx context.Context, local, m channel.Member, mustAnswer bool, accepted chan<- struct{}) error {
	dialing, cancel := context.WithTimeout(ctx, p.cfg.ConnectTimeout)
	defer cancel()
	conn, err := channel.Dial(dialing, p.net, m.Addr())
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	accepted <- struct{}{}
	if !p.cfg.Probe {
		return nil
	}
	// The connection is closed when the detector stops.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(p.cfg.ReadTimeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	options := channel.SendNone
	if mustAnswer {
		options = channel.SendAck
	}
	frame := wire.AppendFrame(nil, &channel.Message{
		ID:      channel.NewUniqueID(),
		From:    local,
		Options: options,
		Time:    time.Now().UnixMilli(),
		Body:    []byte(probeBody),
	})
	if _, err := conn.Write(frame); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if !mustAnswer {
		return nil
	}
	answer := make([]byte, len(wire.Ack))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	if a := string(answer); a != wire.Ack && a != wire.NegativeAck {
		return errWrongAnswer
	}
	return nil
}
