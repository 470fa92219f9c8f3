package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/gorilla/websocket"
)

const (
	channelBytes = 8 // of a channel's name on the publishers' socket
	messageMax   = 1 << 20
	commandMax   = 1024
	queueLength  = 256 // messages that may wait for one client; one that is slower is disconnected
	pingEvery    = 30 * time.Second
	silenceMax   = 75 * time.Second
	writeTimeout = 10 * time.Second
)

func init() {
	caddy.RegisterModule(&Hub{})
	httpcaddyfile.RegisterHandlerDirective("hub", parse)
	httpcaddyfile.RegisterDirectiveOrder("hub", httpcaddyfile.Before, "reverse_proxy")
}

// Hub broadcasts messages to WebSockets, as gorilla/websocket's example of a chat does it: each client has a goroutine
// that reads and one that writes, and one goroutine alone knows who has subscribed to what. A client's goroutine makes a
// system call for each message, or, if the hub is Joined, one for all that wait. Each message has a frame of its own, where
// the example would put all that wait into one.
//
// Clients send {"action":"subscribe","channel":"…"}, or "unsubscribe", and receive the channel's messages as text frames.
// Publishers connect to a Unix socket. A message there is a big-endian length (4 bytes), a channel (8 bytes) and the
// message itself; the length counts what follows it.
//
// A websocket.PreparedMessage, made once for all subscribers, was tried: no faster for a thousand of them, and twice the
// processor time where each message is for two.
type Hub struct {
	Publishers string `json:"publishers,omitempty"`
	Joined     bool   `json:"joined,omitempty"`

	upgrader  websocket.Upgrader
	commands  chan command
	messages  chan message
	stopped   chan struct{}
	publisher net.Listener
}

type client struct {
	connection *websocket.Conn
	joiner     *joiner // nil if each message is written by itself
	queue      chan []byte
	channels   map[string]struct{} // the hub's goroutine alone uses this
}

type command struct {
	client  *client
	action  string // "subscribe", "unsubscribe" or "leave"
	channel string
}

type message struct {
	channel string
	content []byte
}

// CaddyModule is part of caddy.Module.
func (*Hub) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.hub", New: func() caddy.Module { return new(Hub) }}
}

func parse(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	hub := new(Hub)
	return hub, hub.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile reads: hub unix/PATH-FOR-PUBLISHERS [joined]. Caddy would take a bare path for a matcher of requests.
func (h *Hub) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	var address string
	if !d.Args(&address) {
		return d.ArgErr()
	}
	if d.NextArg() {
		if h.Joined = d.Val() == "joined"; !h.Joined || d.NextArg() {
			return d.ArgErr()
		}
	}
	path, found := strings.CutPrefix(address, "unix/")
	if !found {
		return d.Errf("expected unix/PATH, got %s", address)
	}
	h.Publishers = path
	return nil
}

// Provision starts the hub and listens for publishers.
func (h *Hub) Provision(caddy.Context) error {
	h.commands, h.messages = make(chan command, queueLength), make(chan message, queueLength)
	h.stopped = make(chan struct{})
	// Origins are the Caddyfile's affair, as they are for realtimed.
	h.upgrader.CheckOrigin = func(*http.Request) bool { return true }
	listener, err := net.Listen("unix", h.Publishers)
	if err != nil {
		return err
	}
	h.publisher = listener
	go h.run()
	go h.accept()
	return nil
}

// Cleanup ends everything; clients see their connections close.
func (h *Hub) Cleanup() error {
	if h.publisher == nil {
		return nil
	}
	close(h.stopped)
	return h.publisher.Close()
}

// ServeHTTP makes the request a WebSocket. The two goroutines of the client outlive it.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	connection, err := h.upgrader.Upgrade(hijacker{w, h.Joined}, r, nil)
	if err != nil {
		return nil // it has been answered
	}
	c := &client{
		connection: connection,
		queue:      make(chan []byte, queueLength),
		channels:   make(map[string]struct{}),
	}
	c.joiner, _ = connection.NetConn().(*joiner)
	go h.read(c)
	go h.write(c)
	return nil
}

// run is the one goroutine that knows subscriptions. It never waits for a client.
func (h *Hub) run() {
	channels := make(map[string]map[*client]struct{})
	left := make(map[*client]struct{}) // by order of the hub; their readers have yet to say so
	leave := func(c *client) {
		for name := range c.channels {
			delete(channels[name], c)
			if len(channels[name]) == 0 {
				delete(channels, name)
			}
		}
		c.channels = nil
		close(c.queue)
	}
	for {
		select {
		case <-h.stopped:
			return
		case m := <-h.messages:
			for c := range channels[m.channel] {
				select {
				case c.queue <- m.content:
				default:
					left[c] = struct{}{}
					leave(c)
				}
			}
		case do := <-h.commands:
			if _, gone := left[do.client]; gone {
				if do.action == "leave" {
					delete(left, do.client)
				}
				continue
			}
			switch do.action {
			case "leave":
				leave(do.client)
			case "subscribe":
				if channels[do.channel] == nil {
					channels[do.channel] = make(map[*client]struct{})
				}
				channels[do.channel][do.client] = struct{}{}
				do.client.channels[do.channel] = struct{}{}
			case "unsubscribe":
				delete(channels[do.channel], do.client)
				delete(do.client.channels, do.channel)
				if len(channels[do.channel]) == 0 {
					delete(channels, do.channel)
				}
			}
		}
	}
}

func (h *Hub) tell(do command) {
	select {
	case h.commands <- do:
	case <-h.stopped:
		do.client.connection.Close()
	}
}

// read takes a client's commands until its connection ends.
func (h *Hub) read(c *client) {
	defer c.connection.Close()
	defer h.tell(command{client: c, action: "leave"})
	c.connection.SetReadLimit(commandMax)
	c.connection.SetReadDeadline(time.Now().Add(silenceMax))
	c.connection.SetPongHandler(func(string) error {
		return c.connection.SetReadDeadline(time.Now().Add(silenceMax))
	})
	for {
		_, text, err := c.connection.ReadMessage()
		if err != nil {
			return
		}
		var said struct{ Action, Channel string }
		if json.Unmarshal(text, &said) != nil || (said.Action != "subscribe" && said.Action != "unsubscribe") {
			return
		}
		h.tell(command{client: c, action: said.Action, channel: said.Channel})
	}
}

// write sends a client what the hub has queued, and pings.
func (h *Hub) write(c *client) {
	defer c.connection.Close()
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case content, open := <-c.queue:
			c.connection.SetWriteDeadline(time.Now().Add(writeTimeout))
			if !open {
				c.connection.WriteMessage(websocket.CloseMessage, nil)
				return
			}
			if c.send(content) != nil {
				return
			}
		case <-ticker.C:
			if c.connection.WriteControl(websocket.PingMessage, nil, time.Now().Add(writeTimeout)) != nil {
				return
			}
		case <-h.stopped:
			return
		}
	}
}

func (h *Hub) accept() {
	for {
		connection, err := h.publisher.Accept()
		if err != nil {
			return // the listener is closed
		}
		go func() {
			defer connection.Close()
			if err := h.publish(bufio.NewReaderSize(connection, 1<<16)); err != nil && !errors.Is(err, io.EOF) {
				caddy.Log().Error(err.Error())
			}
		}()
	}
}

// publish hands a publisher's messages to the hub until the publisher's connection ends.
func (h *Hub) publish(reader *bufio.Reader) error {
	for {
		var length uint32
		if err := binary.Read(reader, binary.BigEndian, &length); err != nil {
			return err
		}
		if length < channelBytes || length > messageMax {
			return fmt.Errorf("a publisher's message has %d bytes", length)
		}
		said := make([]byte, length)
		if _, err := io.ReadFull(reader, said); err != nil {
			return err
		}
		select {
		case h.messages <- message{string(said[:channelBytes]), said[channelBytes:]}:
		case <-h.stopped:
			return nil
		}
	}
}

var (
	_ caddy.Provisioner           = (*Hub)(nil)
	_ caddy.CleanerUpper          = (*Hub)(nil)
	_ caddyfile.Unmarshaler       = (*Hub)(nil)
	_ caddyhttp.MiddlewareHandler = (*Hub)(nil)
)
